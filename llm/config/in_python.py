"""Messages for notebooks: flags become the keyword arguments of `fit`."""

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args, get_origin

from llm.config.fields import LISTS, field_type
from llm.config.recipe import FIELDS
from llm.config.settings import coerce
from llm.errors import Failure, UserError

# a command line, which stays as it is; or a flag and the word after it, its value only if nothing else follows
FLAG = re.compile(
    r"losscurve [^,;)]*|--(?P<name>[a-z]\w*)(?:[ =](?P<value>'[^']*'|(?!--)[\w./~-]*[\w/])(?P<end>(?=$|[,;)]| --))?)?"
)


@contextmanager
def words_of_python() -> Iterator[None]:
    """In a UserError or Failure raised in the block, replace flags by keyword arguments."""
    try:
        yield
    except (UserError, Failure) as error:
        error.args = (in_python(str(error)),)
        raise


def in_python(message: str) -> str:
    """Return `message` with its flags as keyword arguments: `--resume` as resume=True, `--n_embd 20` as n_embd=20.

    `losscurve train …` becomes a call of `fit`; other commands to type in a terminal stay as they are.
    """
    return FLAG.sub(_keyword, message)


def _keyword(found: re.Match[str]) -> str:
    if found[0].startswith("losscurve train --"):
        return _call(found[0])
    name, value = found["name"], found["value"]
    if name not in (*FIELDS, "resume", "overwrite", "preset", "time"):  # a command, or a flag that `fit` does not have
        return found[0]
    kind = field_type(FIELDS[name])[0] if name in FIELDS else str if name in ("preset", "time") else bool
    if kind is bool:
        return f"{name}=True" + (f" {value}" if value else "")
    if value and re.fullmatch(r"[\d.]+(e[-+]?\d+)?", value) and kind is not str:
        return f"{name}={value}"
    if value and (value in get_args(kind) or (found["end"] is not None and get_origin(kind) is None)):
        return f"{name}={shlex.split(value)[0]!r}"
    return name + (f" {value}" if value else "")


def _call(command: str) -> str:
    """Return the call of `fit` for a `losscurve train` command; the command itself if `fit` lacks one of its flags."""
    given: dict[str, list[str]] = {}
    for word in shlex.split(command)[2:]:
        if word.startswith("--"):
            values = given.setdefault(word.removeprefix("--"), [])
        else:
            values.append(word)
    if not given.keys() <= {*FIELDS, "resume", "overwrite", "preset", "time"}:
        return command
    typed = {
        name: coerce(name, values if name in LISTS else values[0]) for name, values in given.items() if name in FIELDS
    }
    typed |= {name: " ".join(values) or True for name, values in given.items() if name not in FIELDS}
    return f"fit({', '.join(f'{name}={typed[name]!r}' for name in given)})"
