"""The shape that a file of another program describes: checked as our settings are, in the words of that file."""

import dataclasses
from typing import Any

from llm.config import GPTConfig, check_value
from llm.errors import UserError

SHAPE_FIELDS = {f.name: f for f in dataclasses.fields(GPTConfig)}


def check_field(ours: str, value: Any, theirs: str) -> None:
    """Raise UserError for a value that the field `ours` of GPTConfig does not accept; the message calls it `theirs`."""
    check_value(SHAPE_FIELDS[ours], value, theirs)


def foreign_shape(names: dict[str, str], **shape: Any) -> GPTConfig:
    """Return the shape.

    A file's shape cannot be changed by our flags, so no message here names one.

    Args:
        names: the file's names of fields of GPTConfig, where they differ.

    Raises:
        UserError: a value, or two together, that no model of ours has. The remedy is the caller's to add.
    """
    theirs = {name: names.get(name, name) for name in SHAPE_FIELDS}
    for name, value in shape.items():
        check_field(name, value, theirs[name])
    width, heads, head_dim = shape["n_embd"], shape["n_head"], shape.get("head_dim")
    kv_heads = shape.get("n_kv_head") or heads
    if head_dim is None and width % heads:
        raise UserError(f"{theirs['n_embd']} = {width} is not divisible by {theirs['n_head']} = {heads}")
    if heads % kv_heads:
        raise UserError(f"{theirs['n_head']} = {heads} is not divisible by {theirs['n_kv_head']} = {kv_heads}")
    D = head_dim or width // heads
    if shape["arch"] == "llama" and D % 2:
        raise UserError(f"{theirs['head_dim']} = {D}: RoPE turns the channels of a head in pairs")
    return GPTConfig(**shape)
