"""A model's weights as bytes: float32, float16 or int8, in the order of their shapes. `load.js` reads the same.

A matrix of int8 comes as a float32 scale for each row, then its numbers. Vectors (of norms and biases) are always
float32: they are few. All numbers are little-endian.

Shapes: R rows, C columns.
"""

import dataclasses
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm.arch import Model
from llm.errors import UserError

Dtype = Literal["float16", "int8", "float32"]
STEPS = 127  # of int8, on each side of 0

Shapes = dict[str, tuple[int, int]]  # (R, C) by name; a vector has one row
Numbers = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Packed:
    """Weights as bytes. A tied output matrix is not among them, since it is that of the embeddings."""

    dtype: Dtype
    shapes: Shapes
    content: bytes


def pack(model: Model, dtype: Dtype) -> Packed:
    """Return the weights of a model in float32.

    Raises:
        UserError: a weight is too large for float16.
    """
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}  # a tied matrix once
    parts = []
    for name, weight in weights.items():
        parts += [part.tobytes() for part in _rounded(name, weight, dtype if _is_matrix(weight) else "float32")]
    shapes = {
        name: (weight.shape[0], weight.shape[1]) if weight.ndim == 2 else (1, len(weight))
        for name, weight in weights.items()
    }
    return Packed(dtype, shapes, b"".join(parts))


def _is_matrix(weight: Numbers) -> bool:
    return weight.ndim == 2 and len(weight) > 1


def _rounded(name: str, weight: Numbers, dtype: Dtype) -> list[Numbers]:
    if dtype == "float32":
        return [weight.astype("<f4")]
    if dtype == "float16":
        if np.abs(weight).max() > np.finfo(np.float16).max:
            raise UserError(f"{name} has a weight that is too large for float16; give --dtype int8 or float32")
        return [weight.astype("<f2")]
    scales = (np.abs(weight).max(axis=1, keepdims=True) / STEPS).astype("<f4")
    numbers = np.rint(weight / np.where(scales > 0, scales, 1)).clip(-STEPS, STEPS).astype("i1")
    return [scales, numbers]


def unpack(packed: Packed) -> dict[str, Tensor]:
    """Return the weights (R, C), or (C,) of a vector, as float32: those that the page computes with.

    Raises:
        UserError: the bytes are not as many as the shapes need.
    """
    found: dict[str, Tensor] = {}
    at = 0

    def take(kind: str, count: int) -> Numbers:
        nonlocal at
        numbers = np.frombuffer(packed.content, kind, count, at)
        at += numbers.nbytes
        return numbers.astype(np.float32)

    try:
        for name, (rows, columns) in packed.shapes.items():
            dtype = packed.dtype if rows > 1 else "float32"
            scales = take("<f4", rows)[:, None] if dtype == "int8" else np.float32(1)
            kind = {"float32": "<f4", "float16": "<f2", "int8": "i1"}[dtype]
            found[name] = torch.from_numpy(take(kind, rows * columns).reshape(rows, columns) * scales)
    except ValueError:  # numpy: the buffer is too small
        at = -1
    if at != len(packed.content):
        raise UserError("the weights in the file have another size than their shapes; nothing was written")
    return found


def load(model: Model, weights: dict[str, Tensor]) -> None:
    """Replace the weights of a model by those that `unpack` returned."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name].view(p.shape))
