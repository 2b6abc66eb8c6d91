"""Settings, tokens and texts as a report shows them: visible, and without folders of the machine."""

from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from llm.config import TrainConfig, from_settings, to_settings
from llm.errors import UserError
from llm.record.chart_style import plain
from llm.run import Run
from llm.storage.lines import Row
from llm.tokens.tokenizer import Tokenizer

PASSAGE = 300  # characters of the longest passage shown


FOLDERS = ("data_dir", "out_dir", "init_from", "text")  # settings that are paths


OWN = ("data_dir", "out_dir", "vocab_size", "sample_prompt", "dtype", "device")  # what another run would find itself


VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥"}


MISLEADING = {*range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)}


SHOWN = {i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t"} | dict.fromkeys((*MISLEADING, 0xFFFE, 0xFFFF), "�")


def evenly(items: list[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spread, the first and the last among them."""
    return items if len(items) <= most else [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]


def shown(token: int, tokenizer: Tokenizer | None) -> str:
    """A token as it can be seen: spaces and line breaks by signs, bytes that are no text as numbers."""
    if tokenizer is None:
        return str(token)
    content = tokenizer.decode_bytes([token])
    try:
        text = "".join(VISIBLE.get(character, character) for character in content.decode())
    except UnicodeDecodeError:
        return " ".join(f"0x{byte:02X}" for byte in content)
    return plain(visible(text), 40)


def visible(text: str) -> str:
    """A text whose control characters show as signs, and in which nothing turns the direction of what follows."""
    return text.replace("\r\n", "\n").translate(SHOWN)


def differing_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that are not those of the chapter's recipe, nor what another run would find itself."""
    given = {name: value for name, value in to_settings(config).items() if name not in OWN}
    if replace(config, warmup_steps=None).warmup == config.warmup:
        given.pop("warmup_steps", None)
    if replace(config, min_lr=None).final_lr == config.final_lr:
        given.pop("min_lr", None)
    usual = to_settings(from_settings({}))
    return {name: value for name, value in given.items() if usual.get(name) != value}


def spelled(name: str, value: Any) -> str:
    """A setting's value in words."""
    return plain(", ".join(spelled_words(name, value)), 120)


def spelled_words(name: str, value: Any) -> list[str]:
    """A setting's value as the words of a command, folders by their last part."""
    words = [str(word) for word in value] if isinstance(value, tuple) else [str(value)]
    if isinstance(value, bool):
        words = [words[0].lower()]
    return [plain(PurePath(word).name or word if name in FOLDERS else word, 120) for word in words]


def without_folders(message: str, run: Run) -> str:
    """A message in which a run's folders are named by their last part."""
    for folder in (run.path, Path(run.config.data_dir or "data")):
        for name in {str(folder), str(folder.resolve())}:
            message = message.replace(name, PurePath(name).name or name)
    return visible(message)


def last(rows: list[Row], key: str) -> float | None:
    """A number of the last row that has it."""
    return next((row[key] for row in reversed(rows) if row[key] is not None), None)


def writable(out: Path, mark: bytes) -> None:
    """Raises UserError where `out` is something else than an earlier report, which begins with `mark`."""
    try:
        if out.is_symlink() or out.exists():
            if not out.is_file():
                raise UserError(f"{out}: not a file; give another --out")
            with open(out, "rb") as file:
                if not file.read(len(mark)) == mark:
                    raise UserError(f"{out}: there is something else than a report; give another --out")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another --out") from None
