"""Roll back to the newest checkpoint when numbers are not finite, and skip the refused batches."""

from collections.abc import Iterator
from typing import Any

from llm import storage
from llm.errors import Failure
from llm.training.events import Notice, Saved
from llm.training.live import LiveRun
from llm.training.refused import FINITE, NotFinite, describe_batch
from llm.training.saving import saved
from llm.training.state import newest_state, restore

ROLLBACKS = 3  # maximum per run


REMEDY = "start another run with a lower --max_lr, --grad_clip 1 or --dtype float32"


def roll_back(run: LiveRun, error: NotFinite) -> Iterator[Notice | Saved]:
    """Restore the newest checkpoint; from now on, skip the batches that were refused.

    Raises Failure after ROLLBACKS rollbacks, and writes the batch and what was first not finite in it to
    `refused.json`.
    """
    before, batches = run.progress, error.batches
    reason = f"step {batches[0] if batches else before.step}: {error}"
    if before.rollbacks == ROLLBACKS:
        give_up(run, reason, batches[0] if batches else before.step)
    yield from saved(run, wait=True)
    groups, facts, _ = newest_state(run.out_dir, run.parts.world)
    run.progress = restore(run.parts, groups, facts)
    run.progress.skipped = sorted({*before.skipped, *run.progress.skipped, *batches})
    run.progress.rollbacks = before.rollbacks + 1
    run.progress.bookkeeping = before.bookkeeping
    run.reason = None
    run.unread.clear()
    run.restart_pace()
    run.parts.world.first(lambda: cut_files(run))
    without = f", without the batches of steps {batches[0]} to {batches[-1]}" if batches else ""
    yield Notice(f"{reason}; going on from the checkpoint of step {run.progress.step}{without}")


def cut_files(run: LiveRun) -> None:
    """Delete the rows and samples that were recorded after the checkpoint."""
    run.record.cut(run.progress.step)
    run.samples.cut(run.progress.step)


def give_up(run: LiveRun, reason: str, step: int) -> None:
    """Describe in `refused.json` the micro-batch that breaks, or the first if none does. Raises Failure."""
    described: list[dict[str, Any]] = []
    for micro in run.parts.micro_batches(step - 1):  # of a batch at once, memory might not hold the activations
        described += run.parts.world.gather(describe_batch(run.parts, step, micro))
        if any(facts["first"] != FINITE for facts in described):
            break
    facts = next((facts for facts in described if facts["first"] != FINITE), described[0])
    with run.parts.world.together():
        if run.parts.world.leads:
            storage.write_json(run.out_dir / "refused.json", facts)
            raise Failure(
                f"{reason}, first in {facts['first']}, and going back {ROLLBACKS} times did not help; "
                f"the batch is in {run.out_dir / 'refused.json'}; {REMEDY}"
            )
