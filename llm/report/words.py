"""Format settings, tokens and texts for a report: control characters made visible, no folders of this machine."""

from pathlib import Path, PurePath
from typing import Any

from llm.config import TrainConfig, differing_settings, typed_words
from llm.errors import UserError
from llm.record.chart_style import plain
from llm.run import Run
from llm.storage.lines import Row
from llm.tokens.tokenizer import Tokenizer

PATH_SETTINGS = ("data_dir", "out_dir", "init_from", "teacher", "text")
# settings that another run chooses itself, so that the command need not give them
CHOSEN_BY_RUN = ("data_dir", "out_dir", "vocab_size", "sample_prompt", "dtype", "device")

SYMBOLS = {" ": "␣", "\n": "⏎", "\t": "⇥"}
MISLEADING = {*range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)}
REPLACEMENTS = {i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t"} | dict.fromkeys(
    (*MISLEADING, 0xFFFE, 0xFFFF), "\ufffd"
)


def format_token(token: int, tokenizer: Tokenizer | None) -> str:
    """Return a token as visible text: symbols for white space, hexadecimal bytes for incomplete UTF-8.

    Without a tokenizer it is the token id.
    """
    if tokenizer is None:
        return str(token)
    content = tokenizer.decode_bytes([token])
    try:
        text = "".join(SYMBOLS.get(character, character) for character in content.decode())
    except UnicodeDecodeError:
        return " ".join(f"0x{byte:02X}" for byte in content)
    return plain(show_controls(text), 40)


def show_controls(text: str) -> str:
    """Return `text` with control characters replaced by symbols, and without characters that reverse its direction."""
    return text.replace("\r\n", "\n").translate(REPLACEMENTS)


def settings_to_repeat(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that a command has to give for such a run, in addition to the chapter's recipe."""
    repeated = {"vocab_size"} if config.tokenizer == "bpe" else set()  # the size to train a BPE of
    return differing_settings(config, ignored=set(CHOSEN_BY_RUN) - repeated)


def format_setting(name: str, value: Any) -> str:
    """Return a setting's value on one line."""
    return plain(", ".join(setting_words(name, value)), 120)


def setting_words(name: str, value: Any) -> list[str]:
    """Return a setting's value as the words of a command; of a path only its last part."""
    words = typed_words(name, value)
    if name in PATH_SETTINGS:
        words = [PurePath(word).name or word for word in words]
    return [plain(word, 120) for word in words]


def shorten_folders(message: str, run: Run) -> str:
    """Return a message in which the run's folders are named by their last part only."""
    for folder in (run.path, Path(run.config.data_dir or "data")):
        for name in {str(folder), str(folder.resolve())}:
            message = message.replace(name, PurePath(name).name or name)
    return show_controls(message)


def last_value(rows: list[Row], key: str) -> float | None:
    """Return a number of the last row that has it, None if no row has it."""
    return next((row[key] for row in reversed(rows) if row[key] is not None), None)


def check_overwritable(out: Path, mark: bytes) -> None:
    """Check that `out` is free or an earlier report, which starts with `mark`.

    Raises:
        UserError: `out` is something else, or it cannot be read.
    """
    try:
        if not out.is_symlink() and not out.exists():
            return
        if not out.is_file():
            raise UserError(f"{out}: exists and is not a file; give another --out")
        with open(out, "rb") as file:
            if file.read(len(mark)) != mark:
                raise UserError(f"{out}: exists and is not a report, so it is not overwritten; give another --out")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another --out") from None
