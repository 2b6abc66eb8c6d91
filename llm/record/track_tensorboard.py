"""Show a run in TensorBoard."""

import shlex
from pathlib import Path

from llm.config import TrainConfig
from llm.record import metrics
from llm.record.tracker import Say, Start, hyperparameters, scalars
from llm.storage.lines import Row


def with_tensorboard(say: Say) -> Start:
    """Return the TensorBoard tracker, which writes event files into the run's tensorboard/.

    Raises:
        ImportError: TensorBoard is not installed.
    """
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    class TensorBoard:
        def __init__(self, run_dir: Path, config: TrainConfig, first: Row) -> None:
            folder = run_dir / "tensorboard"
            record = run_dir / metrics.NAME
            for old in sorted(folder.glob("events.out.tfevents.*"))[:-1]:  # a running TensorBoard may read the newest
                old.unlink()
            self.where = f"tensorboard --logdir {shlex.quote(str(folder))}"
            # purge_step: from step 0 on, this file replaces the earlier ones
            self._writer = SummaryWriter(str(folder), purge_step=0)
            # the clock of the events: when the run would have reached a row without any pause
            seconds = max(row["seconds"] or 0.0 for row in metrics.read_record(run_dir))
            self._started = record.stat().st_mtime - seconds
            self._now = self._started
            for summary in hparams(hyperparameters(config), {"loss/val": 0.0, "bits_per_byte/val": 0.0}):  # type: ignore[no-untyped-call]
                self._writer.file_writer.add_summary(summary)  # type: ignore[attr-defined]

        def row(self, row: Row) -> None:
            self._now = self._started + (row.get("seconds") or 0.0)
            for name, value in scalars(row).items():
                self._writer.add_scalar(name, value, row["step"], self._now)

        def sample(self, step: int, text: str) -> None:
            literal = "\n".join("    " + line for line in text.splitlines())  # a code block in TensorBoard's Markdown
            self._writer.add_text("sample", literal, step, self._now)

        def flush(self) -> None:
            self._writer.flush()

        def close(self) -> None:
            self._writer.close()

    return TensorBoard
