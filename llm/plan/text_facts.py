"""What the autopilot looks at in a text before it chooses a tokenizer."""

from dataclasses import dataclass
from pathlib import Path

from llm.config import TrainConfig
from llm.errors import UserError
from llm.plan import rule
from llm.plan.text_size import SAMPLE, TEXT_BYTES, beginning
from llm.text import corpus, hub
from llm.text.ngram import cross_entropy

SHAKESPEARE_CHARACTERS = 65  # distinct ones
SHAKESPEARE_CROSS_ENTROPY = 2.5669  # its last tenth
LEAST_VALIDATED = 10_000  # bytes of a validation split, below which its cross-entropy says little


@dataclass(frozen=True)
class TextFacts:
    """A text before it is tokenized."""

    train_bytes: int  # in UTF-8, of the training split; estimated for compressed files and rows
    distinct: int | None  # characters of its first SAMPLE; None: it is not on this machine yet
    bytes_per_character: float
    # bits per byte of the validation split under counts of the training split; None: the text is not on this machine
    # yet, has more than SAMPLE characters, or too few
    cross_entropy: float | None = None

    def validated_bytes(self, val_fraction: float) -> float:
        """Return the bytes of the validation split that is such a fraction of the text."""
        return self.train_bytes * val_fraction / (1 - val_fraction)


def look_at(config: TrainConfig, say: corpus.Say = lambda line: None) -> TextFacts:
    """Return the facts of the text of `config`. A text with a name is not downloaded. `say` gets a line for a folder.

    Raises UserError for a text that does not exist, cannot be read, or is too small.
    """
    names = config.text or (corpus.SHAKESPEARE,)
    files = tuple(name for name in names if name not in corpus.NAMED_TEXTS)
    size = sum(config.text_limit or hub.TEXT_LIMIT for name in names if name in hub.TEXTS)
    size += TEXT_BYTES * (corpus.SHAKESPEARE in names)
    pieces: list[str] = []
    if files:
        _refuse_pipes(files)
        with corpus.opened(files, say=say, text_field=config.text_field) as source:
            size += sum(file.text_bytes() for file in source.files)
            pieces = beginning(source)
    train_bytes = int(size * (1 - config.val_fraction))
    if train_bytes < rule.LEAST_BYTES:
        raise UserError(
            f"text: {train_bytes:,} bytes to train on are too few, a run needs {rule.LEAST_BYTES:,}; "
            "give more text, several files or a folder, or try --text shakespeare"
        )
    if not files:
        is_shakespeare = set(names) == {corpus.SHAKESPEARE}
        usual = is_shakespeare and config.val_fraction == TrainConfig().val_fraction
        return TextFacts(
            train_bytes,
            SHAKESPEARE_CHARACTERS if is_shakespeare else None,
            1.0,
            SHAKESPEARE_CROSS_ENTROPY if usual else None,
        )
    characters = sum(map(len, pieces))
    sampled_bytes = sum(len(piece.encode("utf-8")) for piece in pieces)
    is_whole = characters < SAMPLE and len(files) == len(names)
    return TextFacts(
        train_bytes,
        distinct=len(set().union(*pieces)),
        bytes_per_character=sampled_bytes / max(characters, 1),
        cross_entropy=_cross_entropy("".join(pieces), config.val_fraction) if is_whole else None,
    )


def _cross_entropy(text: str, val_fraction: float) -> float | None:
    """Return that of the last characters of a text under counts of the first ones, None if they are too few."""
    cut = int(len(text) * (1 - val_fraction))
    train, validated = text[:cut].encode("utf-8"), text[cut:].encode("utf-8")
    return cross_entropy(train, validated) if len(validated) >= LEAST_VALIDATED else None


def _refuse_pipes(files: tuple[str, ...]) -> None:
    for name in files:
        path = Path(name)
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{name}: is a pipe, and --time reads the text twice; write it to a file first")
