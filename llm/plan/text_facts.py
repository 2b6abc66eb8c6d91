"""What the autopilot looks at in a text before it chooses a tokenizer."""

from dataclasses import dataclass
from pathlib import Path

from llm.config import TrainConfig
from llm.errors import UserError
from llm.plan import rule
from llm.plan.text_size import TEXT_BYTES
from llm.text import corpus, hub

SAMPLE = 2**24  # characters that are read of a large text
SHAKESPEARE_CHARACTERS = 65  # distinct ones


@dataclass(frozen=True)
class TextFacts:
    """A text before it is tokenized."""

    train_bytes: int  # in UTF-8, of the training split; estimated for compressed files and rows
    distinct: int | None  # characters of its first SAMPLE; None: it is not on this machine yet
    bytes_per_character: float


def look_at(config: TrainConfig, say: corpus.Say = lambda line: None) -> TextFacts:
    """Return the facts of the text of `config`. A text with a name is not downloaded. `say` gets a line for a folder.

    Raises UserError for a text that does not exist, cannot be read, or is too small.
    """
    names = config.text or (corpus.SHAKESPEARE,)
    files = tuple(name for name in names if name not in corpus.NAMED_TEXTS)
    size = sum(config.text_limit or hub.TEXT_LIMIT for name in names if name in hub.TEXTS)
    size += TEXT_BYTES * (corpus.SHAKESPEARE in names)
    alphabet: set[str] = set()
    characters = sampled_bytes = 0
    if files:
        _refuse_pipes(files)
        with corpus.opened(files, say=say, text_field=config.text_field) as source:
            size += sum(file.text_bytes() for file in source.files)
            for piece in (piece for file in source.files for piece in file.read()):
                alphabet.update(piece)
                characters += len(piece)
                sampled_bytes += len(piece.encode("utf-8"))
                if characters >= SAMPLE:
                    break
    train_bytes = int(size * (1 - config.val_fraction))
    if train_bytes < rule.LEAST_BYTES:
        raise UserError(
            f"text: {train_bytes:,} bytes to train on are too few, a run needs {rule.LEAST_BYTES:,}; "
            "give more text, several files or a folder, or try --text shakespeare"
        )
    distinct = len(alphabet) if files else None if set(names) & set(hub.TEXTS) else SHAKESPEARE_CHARACTERS
    return TextFacts(train_bytes, distinct, sampled_bytes / characters if characters else 1.0)


def _refuse_pipes(files: tuple[str, ...]) -> None:
    for name in files:
        path = Path(name)
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{name}: is a pipe, and --time reads the text twice; write it to a file first")
