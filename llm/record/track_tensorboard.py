"""A run as TensorBoard shows it."""

import shlex
from pathlib import Path

from llm.config import TrainConfig
from llm.record import metrics
from llm.record.tracker import Say, Start, hyperparameters, scalars
from llm.storage.lines import Row


def with_tensorboard(say: Say) -> Start:
    """TensorBoard: event files in the run's tensorboard/. Raises ImportError."""
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    class Events:
        def __init__(self, run_dir: Path, config: TrainConfig, first: Row) -> None:
            folder, record = run_dir / "tensorboard", run_dir / metrics.NAME
            for old in sorted(folder.glob("events.out.tfevents.*"))[:-1]:  # a TensorBoard may be reading the newest
                old.unlink()
            self.where = f"tensorboard --logdir {shlex.quote(str(folder))}"
            # from step 0 on, this file takes the place of those before it
            self._writer = SummaryWriter(str(folder), purge_step=0)
            # its clock: when the row was reached, had the run never been stopped
            seconds = max(row["seconds"] or 0.0 for row in metrics.read_record(run_dir))
            self._began = record.stat().st_mtime - seconds
            self._now = self._began
            for summary in hparams(hyperparameters(config), {"loss/val": 0.0, "bits_per_byte/val": 0.0}):  # type: ignore[no-untyped-call]
                self._writer.file_writer.add_summary(summary)  # type: ignore[attr-defined]

        def row(self, row: Row) -> None:
            self._now = self._began + (row.get("seconds") or 0.0)
            for name, value in scalars(row).items():
                self._writer.add_scalar(name, value, row["step"], self._now)

        def sample(self, step: int, text: str) -> None:
            literal = "\n".join("    " + line for line in text.splitlines())  # code, in TensorBoard's Markdown
            self._writer.add_text("sample", literal, step, self._now)

        def flush(self) -> None:
            self._writer.flush()

        def close(self) -> None:
            self._writer.close()

    return Events
