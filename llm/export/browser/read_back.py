"""Read the file of an export back: by Node, which runs the page's own scripts, or without it by a reader of ours.

Shapes: T tokens, V vocabulary.
"""

import base64
import json
import re
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.arch import make_model
from llm.config import GPTConfig
from llm.errors import UserError
from llm.export.browser.pack import Packed, load, unpack
from llm.export.proof import Reader, our_reader
from llm.tokens.saved_tokenizer import tokenizer_from_json

NODE = 18  # the first version with DecompressionStream
LONGEST = 2**29 - 24  # characters of a text, in Node


@contextmanager
def open_reader(path: Path, config: GPTConfig) -> Iterator[Reader]:
    """Yield the best reader that this machine has for the file of a model of shape `config`."""
    node, why_not = find_node(path)
    if node is None:
        yield own_reader(path, config, why_not)
        return
    with ask_node(node, path) as ask:
        windows = (
            count()
        )  # ids of the first come one by one, as when they are drawn; the others' in chunks, as a prompt

        def encode(text: str) -> Sequence[int]:
            return ask(encode=text)["ids"]  # type: ignore[no-any-return]

        def decode(ids: list[int]) -> str:
            return ask(decode=ids)["text"]  # type: ignore[no-any-return]

        def logits(ids: list[int]) -> Tensor:
            content = bytearray(base64.b64decode(ask(feed=ids, whole=next(windows) > 0)["logits"]))
            return torch.frombuffer(content, dtype=torch.float32).view(len(ids), -1)

        yield Reader(f"Node {node_version(node)}, which ran the page's own scripts", encode, decode, logits)


def find_node(path: Path) -> tuple[str | None, str]:
    """Return the Node to read `path` with; None, and why, if there is none that can."""
    node = shutil.which("node") or shutil.which("nodejs")
    if node is None:
        return None, "Node is not installed"
    version = node_version(node)
    if int(re.sub(r"^v(\d+).*", r"\1", version, flags=re.S) or 0) < NODE:
        return None, f"Node {version} is older than {NODE}"
    if path.stat().st_size > LONGEST:
        return None, "Node cannot hold a text of this size"
    return node, ""


def node_version(node: str) -> str:
    return subprocess.run([node, "--version"], capture_output=True, text=True, check=False).stdout.strip() or "v0"


@contextmanager
def ask_node(node: str, path: Path, *flags: str) -> Iterator[Callable[..., dict[str, Any]]]:
    """Yield a function that asks `answer.js` about the file at `path`; it raises UserError for an error in words."""
    with resources.as_file(resources.files("llm.export.browser").joinpath("answer.js")) as script:
        process = subprocess.Popen(
            [node, script, path, *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
        )
    assert process.stdin is not None
    assert process.stdout is not None
    source, target = process.stdout, process.stdin

    def ask(**question: Any) -> dict[str, Any]:
        try:
            target.write(json.dumps(question) + "\n")
            target.flush()
            line = source.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise UserError(f"{path}: Node could not open the page (its words are above); nothing was written")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(f"the page's scripts failed: {answer['error']}; nothing was written")
        return answer

    try:
        yield ask
    finally:
        process.kill()
        process.communicate()


def own_reader(path: Path, config: GPTConfig, why: str) -> Reader:
    """Return a reader that decodes tokenizer and weights, and computes with our model."""
    about, content = read_file(path)
    model = make_model(config).eval()
    load(model, unpack(Packed(about["dtype"], about["shapes"], content)))
    tokenizer = tokenizer_from_json(about["tokenizer"])
    name = f"our own reader, which runs none of the page's scripts ({why})"
    return our_reader(name, model, tokenizer)


def read_file(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return what the file of an export holds: the description of its model, and the weights."""
    page = path.read_text(encoding="utf-8")

    def content(name: str) -> bytes:
        parts = re.findall(rf'<script type="text/plain" class="{name}">([^<]*)</script>', page)
        return zlib.decompress(b"".join(base64.b85decode(part.replace(".", "<")) for part in parts))

    return json.loads(content("about")), content("weights")
