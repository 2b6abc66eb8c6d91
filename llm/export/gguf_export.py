"""`export --to gguf`: write the file of llama.cpp, read it back, compare, and only then give it its name."""

import dataclasses
import struct
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from llm import storage
from llm.arch import make_model
from llm.errors import Failure, UserError
from llm.export import llama_cpp
from llm.export.gguf_file import OUR_VERSION, write_gguf
from llm.export.proof import FLOAT32_BOUND, Proof, prove
from llm.export.source import Source
from llm.weights.gguf_file import MAGIC, read_gguf

# Largest difference of a logit as a share of the largest: what the type's rounding of weights and activations can do
BOUNDS = {"float32": FLOAT32_BOUND, "float16": 0.02, "bfloat16": 0.1, "q8_0": 0.2}
GELU_BOUND = 0.005  # of gpt2 in float32: llama.cpp computes GELU by tanh, from a table in float16
STRING = 8  # GGUF's type
# How the key with a string begins in a file: identifies an earlier export
MARK = struct.pack("<Q", len(OUR_VERSION)) + OUR_VERSION.encode() + struct.pack("<I", STRING)
HEAD = 4096  # bytes, at the beginning of a file, that have the key


def export_gguf(source: Source, out: Path, dtype: str, overwrite: bool, say: Callable[[str], None]) -> None:
    """Write the run to the GGUF file `out`, and say the figures of its proof.

    llama.cpp reads it back if xllamacpp is installed, else the package gguf. The file appears when it is proved.

    Args:
        dtype: of the matrices: float32, float16, bfloat16 or q8_0.

    Raises:
        UserError: the file exists, the run cannot be said in this format, or what reads it back differs.
        Failure: the disk is full, or llama.cpp stopped.
    """
    check_free(out, overwrite)
    if source.model.config.block_size < 2:
        raise UserError("block_size = 1: llama.cpp cannot run a context of one token; export a run with a longer one")
    storage.check_writable(out.parent)
    place = out.resolve()  # a link stays, and what it leads to is replaced
    name = source.run.path.resolve().name
    with storage.writing(place) as file:
        try:
            instead = write_gguf(source.model, source.tokenizer, Path(file.name), dtype, name)
        except OSError as error:
            cause = error.strerror or "the disk took only a part"  # NumPy raises it without a number
            raise Failure(f"{out}: cannot be written ({cause}); free some disk space and retry") from None
        _say_differences(source, instead, say)
        _say_proof(source, Path(file.name), dtype, say)


def check_free(out: Path, overwrite: bool) -> None:
    """Raise UserError if `out` exists, unless it may be overwritten and is an earlier export."""
    if not out.exists() and not out.is_symlink():
        return
    head = b""
    if out.is_file():
        with out.open("rb") as file:
            head = file.read(HEAD)
    if not (head.startswith(MAGIC) and MARK in head):
        raise UserError(f"{out}: exists, and is no export of ours; choose another --out")
    if not overwrite:
        raise UserError(f"{out}: exists; replace it with --overwrite, or choose another --out")


def _say_differences(source: Source, instead: list[str], say: Callable[[str], None]) -> None:
    """Say what of the run the file does not hold."""
    if instead:
        names = ", ".join(instead[:3]) + (", …" if len(instead) > 3 else "")
        say(f"q8_0 needs rows of a multiple of 32 weights: {len(instead)} matrices are in float16 ({names})")
    if source.model.config.arch == "gpt2" and source.model.config.gelu == "exact":
        say("llama.cpp computes GELU by tanh, the run has the exact one: the figures below include the difference")


def _say_proof(source: Source, path: Path, dtype: str, say: Callable[[str], None]) -> None:
    bound = BOUNDS[dtype]
    if source.model.config.arch == "gpt2":
        bound = max(bound, GELU_BOUND)
    if llama_cpp.is_installed():
        say(str(llama_cpp.prove_by_llama_cpp(source, path, bound)))
        return
    say(str(_prove_by_gguf(source, path, bound)))
    say("llama.cpp itself has not read it, because it is not installed; install it with: pip install xllamacpp")


def _prove_by_gguf(source: Source, path: Path, bound: float) -> Proof:
    """Compare the run with a model of ours that has the weights and the tokenizer in the file, and llama.cpp's GELU."""
    found = read_gguf(path)
    assert found.tokenizer is not None
    encode = found.tokenizer.encode
    shape = found.config if found.config.arch == "llama" else dataclasses.replace(found.config, gelu="tanh")
    copy = make_model(shape).eval()
    copy.load_state_dict(found.weights)

    @torch.no_grad()
    def logits(ids: list[int]) -> Tensor:
        rows: Tensor = copy(torch.tensor([ids]))[0][0]
        return rows

    reader = f"the package gguf {metadata.version('gguf')}, into a model of losscurve"
    return prove(source, reader, lambda text: encode(text).tolist(), logits, bound)
