"""Assemble WebAssembly's text format (.wat) into a module: the few instructions that kernel.wat has, nothing more.

The format is that of the WebAssembly specification (W3C 2022, sections 5 and 6), so any other assembler reads the
same text. It must have one function, which is exported, and one memory, which is imported.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import groupby

from llm.errors import UserError

TYPES = {"i32": 0x7F, "v128": 0x7B}
PLAIN = {"end": [0x0B], "i32.add": [0x6A], "i32.sub": [0x6B], "i32.shl": [0x74], "i32.lt_u": [0x49]}
SIMD = {"i32x4.splat": 0x11, "f32x4.add": 0xE4, "f32x4.mul": 0xE6}
OF_LOCAL = {"local.get": 0x20, "local.set": 0x21, "local.tee": 0x22}
OF_MEMORY = {"v128.load": 0x00, "v128.store": 0x0B}
SIMD_PREFIX = 0xFD
SHUFFLE = 0x0D
ALIGNMENT = 4  # of an access to memory: 2**4 bytes, a hint
NO_VALUE = 0x40  # the type of a loop that leaves nothing on the stack


def assemble(text: str) -> bytes:
    """Return the WebAssembly module of a text. Raises UserError for what it has no code for."""
    words = re.findall(r'[()]|"[^"]*"|[^\s()]+', re.sub(r";;.*", "", text))
    place, name = (word.strip('"') for word in words[words.index("import") + 1 :][:2])
    exported = words[words.index("export") + 1].strip('"')
    body = words[words.index("func") + 1 : -2]  # without the parentheses that close function and module
    params = list(_declared(body, "param"))
    locals_ = list(_declared(body, "local"))
    code = body[max(i for i, word in enumerate(body) if word == ")") + 1 :]
    variables = {name: number for number, (name, _) in enumerate([*params, *locals_])}
    runs = [(TYPES[kind], len(list(run))) for kind, run in groupby(kind for _, kind in locals_)]
    declared = b"".join(_unsigned(count) + bytes([kind]) for kind, count in runs)
    function = _unsigned(len(runs)) + declared + bytes(_instructions(code, variables)) + b"\x0b"
    kinds = [TYPES[kind] for _, kind in params]
    sections = (
        (1, b"\x60" + _vector(kinds) + b"\0"),  # the function's type, without result
        (2, _name(place) + _name(name) + b"\x02\0\x01"),  # the memory, of at least one page
        (3, b"\0"),  # the function has the first type
        (7, _name(exported) + b"\0\0"),
        (10, _unsigned(len(function)) + function),
    )
    listed = [bytes([number]) + _unsigned(len(content) + 1) + b"\x01" + content for number, content in sections]
    return b"\0asm\x01\0\0\0" + b"".join(listed)


def _declared(body: list[str], what: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the type of each parameter or local."""
    for i, word in enumerate(body):
        if word == what and body[i - 1] == "(":
            yield body[i + 1], body[i + 2]


def _instructions(code: list[str], variables: dict[str, int]) -> Iterator[int]:
    """Yield the bytes of the instructions."""
    words = iter(code)
    loops: list[str] = []  # the names of the open loops, outermost first
    pending = next(words, None)
    while (word := pending) is not None:
        pending = None
        if word in PLAIN:
            if word == "end":
                loops.pop()
            yield from PLAIN[word]
        elif word in SIMD:
            yield from (SIMD_PREFIX, *_unsigned(SIMD[word]))
        elif word in OF_LOCAL:
            yield from (OF_LOCAL[word], *_unsigned(variables[next(words)]))
        elif word in OF_MEMORY:
            pending = next(words, None)
            offset = 0
            if pending is not None and pending.startswith("offset="):
                offset = int(pending.removeprefix("offset="))
                pending = None
            yield from (SIMD_PREFIX, OF_MEMORY[word], ALIGNMENT, *_unsigned(offset))
        elif word == "i8x16.shuffle":
            yield from (SIMD_PREFIX, SHUFFLE, *(int(next(words)) for _ in range(16)))
        elif word == "i32.const":
            yield from (0x41, *_signed(int(next(words))))
        elif word == "loop":
            loops.append(next(words))
            yield from (0x03, NO_VALUE)
        elif word == "br_if":
            yield from (0x0D, *_unsigned(len(loops) - 1 - loops.index(next(words))))
        else:
            raise UserError(f"kernel.wat: no code for {word!r}; add it to the assembler")
        pending = pending or next(words, None)


def _unsigned(number: int) -> bytes:
    """Return a number as LEB128: seven bits a byte, the lowest first."""
    found = []
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def _signed(number: int) -> bytes:
    """Return a number from 0 to 63 as signed LEB128, where bit 6 is the sign."""
    if not 0 <= number < 64:
        raise UserError(f"kernel.wat: i32.const {number}: the assembler has 0 to 63 only")
    return bytes([number])


def _vector(items: Iterable[int]) -> bytes:
    content = bytes(items)
    return _unsigned(len(content)) + content


def _name(text: str) -> bytes:
    return _vector(text.encode())
