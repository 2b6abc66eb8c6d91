"""What a power cut may leave on the disk, given the log of what a program did.

What POSIX promises is little, and this model takes away all the rest:

- What was written to a file is on the disk once that file was flushed (fsync). Before that, all of it may be there,
  none of it, the first half, or the new length with zeros for bytes.
- A name that was made, moved or taken away is so on the disk once its folder was flushed. Before that, each such
  change may be there or not, in whatever order. Flushing a file says nothing of its name, flushing a folder nothing
  of the bytes in it and nothing of the folder's own name in the folder above.
- A change of names is whole or absent: a rename never leaves both names or neither. POSIX does not say so of a power
  cut, but every file system with a journal or with copies on write keeps it, and nothing could be built without.
  A rename between two folders is on the disk once either of them was flushed.
- A folder is not replaced and not removed while there is something in it, so a change that would need this waits.

A cut falls after any operation. For each, data and names are lost by four policies each, and by seeded draws in
which each file and each name keeps or loses its change by a draw of its own.
"""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults.disk import Disk, Node, Op

DATA = ("kept", "dropped", "torn", "zeros")
NAMES: dict[str, Callable[[Op], bool]] = {
    "kept": lambda op: True,
    "dropped": lambda op: False,
    "removals": lambda op: op.kind in ("unlink", "rmdir"),
    "additions": lambda op: op.kind not in ("unlink", "rmdir"),
}
DRAWS = 6
POLICIES = [f"data {data}, names {names}" for data in DATA for names in NAMES] + [f"draw {n}" for n in range(DRAWS)]

Tree = dict[str, tuple[str, bytes]]  # path below the root -> (file, folder or symlink; content)


@dataclass(frozen=True)
class Cut:
    """A power cut after `prefix` operations, what it left being decided by `policy`."""

    prefix: int
    policy: str
    promised: tuple[str, ...]  # the marks before it


class Volume:
    """The disk at a moment: what is safely on it, and what is still on its way there."""

    def __init__(self, first: dict[int, Node]) -> None:
        self.nodes = {number: Node(node.kind, node.data) for number, node in first.items()}
        self.entries = {number: dict(node.entries) for number, node in first.items()}
        self.written: dict[int, list[Op]] = {number: [] for number in first}
        self.named: list[Op] = []

    def apply(self, op: Op) -> None:
        if op.kind in ("create", "mkdir", "symlink"):
            kind = {"create": "file", "mkdir": "folder"}.get(op.kind, op.kind)
            self.nodes[op.number] = Node(kind, op.data)
            self.entries[op.number], self.written[op.number] = {}, []
        if op.kind in ("write", "truncate"):
            self.written[op.number].append(op)
        elif op.kind == "fsync":
            self._flush(op.number)
        elif op.kind != "mark":
            self.named.append(op)

    def _flush(self, number: int) -> None:
        node = self.nodes[number]
        node.data = _content(node.data, self.written[number], "kept")
        self.written[number] = []
        done: list[Op] = []
        places: set[tuple[int, str]] = set()
        folders = {number}
        for op in reversed(self.named):  # a change takes the earlier ones of the same names with it
            touched = _touched(op)
            if touched & places or any(folder in folders for folder, _ in touched):
                done.append(op)
                places |= touched
                if op.kind == "rmdir":  # and the end of a folder the end of all that was in it
                    folders.add(op.number)
        for op in reversed(done):
            _perform(self.entries, op)
        self.named = [op for op in self.named if not any(op is other for other in done)]

    def after(self, policy: str, prefix: int = 0) -> Tree:
        """The tree that is found when the power is back."""
        draw = random.Random(f"{policy} {prefix}")
        if policy.startswith("draw"):

            def keeps(op: Op) -> bool:
                return draw.random() < 0.5

            def fate() -> str:
                return draw.choice(DATA)

        else:
            data, names = (part.split()[1] for part in policy.split(","))

            def keeps(op: Op) -> bool:
                return NAMES[names](op)

            def fate() -> str:
                return data

        entries = {number: dict(inside) for number, inside in self.entries.items()}
        for op in self.named:
            if keeps(op):
                _perform(entries, op)
        tree: Tree = {}
        self._gather(entries, 0, "", fate, tree)
        return tree

    def _gather(
        self, entries: dict[int, dict[str, int]], at: int, path: str, fate: Callable[[], str], tree: Tree
    ) -> None:
        for name, number in sorted(entries[at].items()):
            node, inner = self.nodes[number], os.path.join(path, name)
            tree[inner] = (node.kind, _content(node.data, self.written[number], fate()))
            if node.kind == "folder":
                self._gather(entries, number, inner, fate, tree)


def _touched(op: Op) -> set[tuple[int, str]]:
    return {place for place in (op.place, op.target) if place is not None}


def _perform(entries: dict[int, dict[str, int]], op: Op) -> None:
    """One change of names, if it still applies."""
    assert op.place is not None
    folder, name = op.place
    if op.kind in ("unlink", "rmdir"):
        if entries[folder].get(name) == op.number and not entries[op.number]:
            del entries[folder][name]
        return
    to, new = op.target or op.place
    there = entries[to].get(new)
    if there is not None and there != op.number and entries[there]:
        return
    if op.kind == "rename" and entries[folder].get(name) == op.number:
        del entries[folder][name]
    entries[to][new] = op.number


def _content(data: bytes, written: list[Op], policy: str) -> bytes:
    """A file's bytes, when of what was written since its last flush `policy` remains."""
    if policy == "dropped":
        return data
    content = bytearray(data)
    room = sum(len(op.data) for op in written) // 2 if policy == "torn" else None
    for op in written:
        if op.kind == "truncate":
            content[op.offset :] = bytes(max(0, op.offset - len(content)))
            continue
        piece = op.data if room is None else op.data[:room]
        room = None if room is None else room - len(piece)
        if piece:
            content[len(content) :] = bytes(max(0, op.offset - len(content)))
            content[op.offset : op.offset + len(piece)] = bytes(len(piece)) if policy == "zeros" else piece
    return bytes(content)


def found(root: Path) -> Tree:
    """The tree that is really below `root`."""
    tree: Tree = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            tree[name] = ("symlink", os.fsencode(os.readlink(path)))
        else:
            tree[name] = ("folder", b"") if path.is_dir() else ("file", path.read_bytes())
    return tree


def build(tree: Tree, folder: Path) -> None:
    folder.mkdir()
    for name, (kind, content) in sorted(tree.items()):
        if kind == "folder":
            (folder / name).mkdir()
        elif kind == "symlink":
            (folder / name).symlink_to(os.fsdecode(content))
        else:
            (folder / name).write_bytes(content)


def as_recorded(disk: Disk) -> Tree:
    """The tree that the log leads to with nothing lost; equal to `found` unless something went past the disk."""
    volume = Volume(disk.first)
    for op in disk.log:
        volume.apply(op)
    return volume.after("data kept, names kept")


def power_cuts(disk: Disk, place: Path) -> Iterator[tuple[Cut, Path]]:
    """Every cut of what `disk` recorded, each with a folder in `place` as it would be found.

    Cuts that leave the same tree after the same promises are one. The folder is removed afterwards.
    """
    volume, promised = Volume(disk.first), []
    seen: set[int] = set()
    place.mkdir(exist_ok=True)
    for prefix in range(len(disk.log) + 1):
        if prefix:
            volume.apply(disk.log[prefix - 1])
            if disk.log[prefix - 1].kind == "mark":
                promised.append(disk.log[prefix - 1].path)
        for policy in POLICIES:
            tree = volume.after(policy, prefix)
            key = hash((tuple(promised), tuple(sorted(tree.items()))))
            if key in seen:
                continue
            seen.add(key)
            folder = place / f"{prefix}-{POLICIES.index(policy)}"
            build(tree, folder)
            yield Cut(prefix, policy, tuple(promised)), folder
            shutil.rmtree(folder)
