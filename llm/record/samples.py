"""Read and write the samples of a run: its continuation of one prompt at each evaluation.

`samples.jsonl` has one JSON object a line: `step` (completed steps), `val_loss` (nats per token), `prompt` and `text`
(the continuation). `samples.txt`, for reading, is written from it.
"""

from dataclasses import dataclass
from pathlib import Path

from llm import storage
from llm.errors import UserError
from llm.storage import lines
from llm.storage.lines import Lines, Row, parse_object

NAME = "samples.jsonl"
TEXT_NAME = "samples.txt"


@dataclass(frozen=True)
class Sample:
    """The text that a run generated at one evaluation."""

    step: int
    val_loss: float  # nats per token
    prompt: str
    text: str  # without the prompt


class Samples(Lines):
    """The samples of the run in `run_dir`, in both files."""

    def __init__(self, run_dir: Path, writes: bool = True) -> None:
        super().__init__(run_dir / NAME, parse_row, writes)

    def catch_up(self) -> None:
        """Write the pending samples, on the disk, then `samples.txt`.

        Raises:
            OSError: a file cannot be written.
        """
        super().catch_up()
        if self.writes:
            self.flush(self.added)
            write_text(self.path.parent)

    def cut(self, step: int) -> None:
        """Drop the samples after `step` from both files, pending ones too.

        Raises:
            OSError: a file cannot be written.
            UserError: a line is damaged; the message names it.
        """
        super().cut(step)
        if self.writes:
            write_text(self.path.parent)


def read_samples(run_dir: Path) -> list[Sample]:
    """Return the samples of a run, oldest first; an empty list if the run has written none.

    Raises:
        UserError: a line is damaged, or the file cannot be read; the message names it.
    """
    path = run_dir / NAME
    try:
        rows = [row for _, row in lines.read(path, parse_row)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return [Sample(row["step"], row["val_loss"], row["prompt"], row["text"]) for row in rows]


def parse_row(line: bytes) -> Row:
    """Return the row that a line holds.

    Raises:
        ValueError: the line is not a sample; the message names the field.
    """
    row = parse_object(line)
    if type(row.get("val_loss")) not in (int, float):
        raise ValueError("val_loss is not a number")
    if not isinstance(row.get("prompt"), str) or not isinstance(row.get("text"), str):
        raise ValueError("prompt or text is not a string")
    return row


def write_text(run_dir: Path) -> None:
    """Write `samples.txt` from `samples.jsonl`.

    Raises:
        OSError: the file cannot be written.
        UserError: a line of `samples.jsonl` is damaged.
    """
    blocks = [
        f"--- step {sample.step} | val {sample.val_loss:.4f} ---\n{sample.prompt}{sample.text}\n\n"
        for sample in read_samples(run_dir)
    ]
    storage.write_text(run_dir / TEXT_NAME, "".join(blocks))
