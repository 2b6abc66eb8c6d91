"""One step, and the loop around it.

A step takes its batch, sets its learning rate, runs forward and backward over its micro-batches, and lets the
optimizer step. `Training` evaluates, records, samples, draws and saves around that.

B windows of a micro-batch, T block_size.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llm import checkpoint, metrics, storage
from llm.data import batch_at
from llm.device import matrix_rate, onto, precision
from llm.distributed import whole
from llm.errors import Failure, UserError
from llm.evaluate import Evaluation, evaluate
from llm.plot import plot_runs
from llm.refused import FINITE, describe_batch, refused_in_a_row
from llm.samples import keep_samples, sample_text
from llm.saver import Saver, not_finite
from llm.schedule import lr_at
from llm.state import Progress, Trainer, facts_of, newest_state, restore, tensors_of, weights_of, write_state

REMEDY = "start another run with a lower --max_lr, --grad_clip 1 or --dtype float32"
GO_BACK = 3  # times a run does so before it stops
UNREAD = 50  # steps after which their losses are read off the device, if nothing else asked for them


@dataclass(frozen=True)
class Step:
    """One finished step. Its tensors stay on the device until they are read."""

    step: int  # batches done
    loss: Tensor  # mean over the batch, nats per token
    grad_norm: Tensor  # before clipping
    refused: Tensor  # loss or gradient is not finite, so no update was made


@dataclass(frozen=True)
class Line:
    """One evaluation, in the chapter's words."""

    step: int
    lr: float
    train_loss: float  # mean over the steps since the line before; at step 0, of the first batch
    evaluation: Evaluation
    seconds: float
    sample: str

    def __str__(self) -> str:
        losses = f"train {self.train_loss:.4f} | val {self.evaluation.loss:.4f}"
        return f"step {self.step:5d} | lr {self.lr:.5f} | {losses} | t {self.seconds:.1f}s"


@dataclass(frozen=True)
class Saved:
    """A state that is on the disk."""

    step: int
    folder: Path


@dataclass(frozen=True)
class Notice:
    """Something that the person who trains should know."""

    text: str


def micro_batches(trainer: Trainer, step: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This process's share of the batch of `step` in micro-batches: x and y (B, T), seeds (B,), on the device."""
    config, start = trainer.config, time.perf_counter()
    windows, mine = config.windows_per_step, trainer.world.rows(config.windows_per_step)
    batch = batch_at(trainer.data.train, config.seed, step, windows, config.model.block_size, mine)
    trainer.data_seconds += time.perf_counter() - start
    for first in range(0, len(batch.x), config.batch_size):
        rows = slice(first, first + config.batch_size)
        x, y, seeds = (onto(trainer.device, part[rows]) for part in (batch.x, batch.y, batch.seeds))
        yield x, y, seeds


def train_step(trainer: Trainer, step: int) -> Step:
    """Update number `step`, counted from 0. If its loss or gradient is not finite, it leaves everything as it was;
    that is decided on the device, so that nothing waits for it.
    """
    config, optimizer, scaler = trainer.config, trainer.optimizer, trainer.scaler
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step, config)
    optimizer.zero_grad()
    total, done, (share, _) = torch.zeros((), device=trainer.device), 0, config.share(trainer.world.size)
    for x, y, seeds in micro_batches(trainer, step):
        done += len(x)
        with trainer.exchange(done == share):
            with precision(trainer.dtype, trainer.device):
                loss = trainer.forward(x, y, seeds)[1] / (share / len(x))
            scaler.scale(loss).backward()
        total += loss.detach()
    trainer.world.mean(total)
    scaler.unscale_(optimizer)  # type: ignore[arg-type]  # all it asks for are the groups
    norm = whole(torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters() if p.grad is not None]))
    if config.grad_clip > 0:
        torch.nn.utils.clip_grads_with_norm_(trainer.model.parameters(), config.grad_clip, norm)
    refused = ~torch.isfinite(total)
    if not scaler.is_enabled():  # which has its own: a gradient that overflows only lowers its scale
        refused = refused | ~torch.isfinite(norm.to(trainer.device))
        optimizer.found_inf = refused.float()
    scaler.step(optimizer)  # type: ignore[arg-type]
    scaler.update()
    return Step(step + 1, total, norm, refused)


def passed_over(trainer: Trainer, step: int) -> Step:
    """What stands for a batch that is not tried again."""
    nan = torch.full((), math.nan, device=trainer.device)
    return Step(step + 1, nan, nan, torch.isnan(nan))


class Training:
    """A run under way: iterating trains, and yields each `Step`, `Line`, `Saved` and `Notice` as it happens.

    `stop` is asked after each step; when it says so, the state is saved and the run ends in good order.
    Afterwards `reason` says why it ended: "done", "max_time", "patience" or "interrupted"; `unsaved` says what
    the last save could not keep and why, and is None if it succeeded.
    Raises Failure, with the last saved state as it was, where going back to it often enough did not help.
    """

    def __init__(self, trainer: Trainer, out_dir: Path, progress: Progress, prompt: str) -> None:
        self.trainer, self.out_dir, self.progress, self.prompt = trainer, out_dir, progress, prompt
        self.stop: Callable[[], bool] = lambda: False
        self.reason = "done"
        self.unsaved: str | None = None
        self.failed_saves = 0
        self.matrix_rate = trainer.world.size * matrix_rate(trainer.device, trainer.dtype)  # of all devices
        self.token_bytes = trainer.tokenizer.token_bytes() if trainer.tokenizer else None
        self._record, self._samples, self._saver = metrics.Record(out_dir, trainer.world.leads), "", Saver()
        self._unread: list[Step] = []
        self._said: set[str] = set()  # what went wrong and was said, and has not gone well since
        self._began = self._saved_at = time.perf_counter()
        self._began -= progress.seconds
        self._pace = (0.0, 0)  # seconds of steps and tokens at the last training record

    def __iter__(self) -> Iterator[Step | Line | Saved | Notice]:
        try:
            yield from self._run()
        finally:
            self._saver.close()

    def _run(self) -> Iterator[Step | Line | Saved | Notice]:
        trainer, config = self.trainer, self.trainer.config
        trainer.model.train()
        self._pace = (self._stepping(), self.progress.tokens)
        if trainer.world.first(lambda: not checkpoint.saved_steps(self.out_dir)):
            yield from self._tell()
            yield from self._save()
        while self.progress.step < config.max_steps:
            progress = self.progress
            skipped = progress.step + 1 in progress.passed_over
            step = (passed_over if skipped else train_step)(trainer, progress.step)
            progress.step, progress.tokens = step.step, progress.tokens + config.tokens_per_step
            self._unread.append(step)
            yield step
            yield from self._saved()
            done = step.step == config.max_steps
            late = config.max_time is not None and trainer.world.any(self.seconds() >= config.max_time)[0]
            telling = step.step % config.eval_every == 0 or done or late
            logging = telling or step.step % config.log_every == 0
            if logging or step.step % UNREAD == 0:
                self._read()
                if batches := refused_in_a_row(self.progress):
                    yield from self._go_back("loss or gradient is not a finite number", batches)
                    continue
            if logging:
                yield from self._log(step)
            if telling:
                yield from self._tell()
            worn = progress.stale >= (config.patience or math.inf)
            asked, due = trainer.world.any(self.stop(), self._save_is_due())
            ending = done or late or worn or asked
            if ending or (telling and progress.stale == 0) or due:
                if broken := next(filter(None, trainer.world.gather(not_finite(tensors_of(trainer)))), None):
                    yield from self._go_back(f"{broken} holds a number that is not finite", [])
                    continue
                yield from self._save(wait=ending)
            if ending:
                self.reason = "done" if done else "max_time" if late else "patience" if worn else "interrupted"
                return

    def seconds(self) -> float:
        """Since the start of the run, what came before a resume included."""
        return time.perf_counter() - self._began

    def utilisation(self, tokens_per_second: float) -> float:
        """Model FLOP utilisation: the share of the matrix rate measured here at the start."""
        return tokens_per_second * self.trainer.model.flops_per_token() / self.matrix_rate

    def _stepping(self) -> float:
        return self.seconds() - self.progress.bookkeeping

    @contextmanager
    def _bookkeeping(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.progress.bookkeeping += time.perf_counter() - start

    def _failed(self, what: str, error: Exception) -> Iterator[Notice]:
        """Say once that something could not be written, until it could again."""
        if what not in self._said:
            self._said.add(what)
            reason = getattr(error, "strerror", None) or error
            yield Notice(f"{what} ({reason}); training goes on, and it is tried again later")

    def _read(self) -> None:
        """Read the losses of the steps off the device: the one place where it is waited for."""
        if not self._unread:
            return
        progress = self.progress
        losses = [max(loss, 0.0) for loss in torch.stack([step.loss for step in self._unread]).tolist()]
        refused = torch.stack([step.refused for step in self._unread]).tolist()
        for step, loss, bad in zip(self._unread, losses, refused, strict=True):
            progress.losses.append(None if bad else loss)
            if bad:
                progress.refused.append(step.step)
            else:
                progress.told_loss, progress.told_count = progress.told_loss + loss, progress.told_count + 1
        self._unread.clear()

    def _go_back(self, reason: str, batches: list[int]) -> Iterator[Notice | Saved]:
        """To the newest saved state, to pass over the `batches` that were refused. Raises Failure if that was done
        often enough, leaving `refused.json` to tell what was in the batch and where its numbers broke.
        """
        progress, step = self.progress, batches[0] if batches else self.progress.step
        reason = f"step {step}: {reason}"
        if progress.went_back == GO_BACK:
            x, y, seeds = (torch.cat(parts) for parts in zip(*micro_batches(self.trainer, step - 1), strict=True))
            told = self.trainer.world.gather(describe_batch(self.trainer, step, x, y, seeds))
            facts = next((facts for facts in told if facts["first"] != FINITE), told[0])
            with self.trainer.world.together():
                if self.trainer.world.leads:
                    storage.write_json(self.out_dir / "refused.json", facts)
                    raise Failure(
                        f"{reason}, first in {facts['first']}, and going back {GO_BACK} times did not help; "
                        f"the batch is in {self.out_dir / 'refused.json'}; {REMEDY}"
                    )
        yield from self._saved(wait=True)
        groups, facts, _ = newest_state(self.out_dir, self.trainer.world)
        self.progress = restore(self.trainer, groups, facts)
        self.progress.passed_over = sorted({*progress.passed_over, *self.progress.passed_over, *batches})
        self.progress.went_back, self.progress.bookkeeping = progress.went_back + 1, progress.bookkeeping
        self.trainer.world.first(lambda: self._record.cut(self.progress.step))
        self._unread.clear()
        self._samples, self._pace = "", (self._stepping(), self.progress.tokens)
        without = f", without the batches of steps {batches[0]} to {batches[-1]}" if batches else ""
        yield Notice(f"{reason}; going on from the state of step {self.progress.step}{without}")

    def _log(self, step: Step) -> Iterator[Notice]:
        """Record the mean loss since the last record."""
        progress = self.progress
        then, tokens = self._pace
        self._pace = (self._stepping(), progress.tokens)
        marks: dict[str, list[int]] = {"refused": [], "spikes": []}
        for number, loss in enumerate(progress.losses, step.step - len(progress.losses) + 1):
            if loss is None:
                marks["refused"].append(number)
                continue
            if metrics.is_spike(loss, progress.recent):
                marks["spikes"].append(number)
            progress.recent = [*progress.recent[1 - metrics.SPIKE_HISTORY :], loss]
        trained = [loss for loss in progress.losses if loss is not None]
        progress.losses = []
        # a step that is passed over takes no time
        idle = any(number in progress.passed_over for number in marks["refused"])
        speed = None if idle else (progress.tokens - tokens) / (self._pace[0] - then)
        self._record.add(
            step=step.step,
            split="train",
            loss=math.fsum(trained) / len(trained) if trained else None,
            lr=lr_at(step.step, self.trainer.config),
            grad_norm=step.grad_norm.item(),
            tokens=progress.tokens,
            seconds=round(self.seconds(), 3),
            tokens_per_second=None if speed is None else round(speed, 1),
            mfu=None if speed is None else round(self.utilisation(speed), 4),
            data_seconds=round(self.trainer.data_seconds, 4),
            **{name: steps for name, steps in marks.items() if steps},
        )
        self.trainer.data_seconds = 0.0
        yield from self._write_record()
        if marks["refused"]:
            named = ", ".join(map(str, marks["refused"]))
            yield Notice(f"no update at step {named}: loss or gradient is not a finite number")

    def _write_record(self) -> Iterator[Notice]:
        what = "metrics.jsonl could not be written"
        try:
            with self._bookkeeping():
                self._record.catch_up()
            self._said.discard(what)
        except OSError as error:
            yield from self._failed(what, error)

    def _tell(self) -> Iterator[Line | Notice]:
        """Evaluate, record, sample and draw."""
        with self._bookkeeping():
            trainer, config, progress = self.trainer, self.trainer.config, self.progress
            lr, facts = lr_at(progress.step, config), {"step": progress.step, "tokens": progress.tokens}
            if progress.step == 0:
                train_loss = first_loss(trainer)
                self._record.add(split="train", loss=train_loss, lr=lr, seconds=0.0, **facts)
            else:
                train_loss = progress.told_loss / progress.told_count if progress.told_count else math.nan
            with precision(trainer.dtype, trainer.device):
                where = trainer.model, trainer.data.val, config.model.block_size, config.eval_tokens
                found = evaluate(*where, self.token_bytes, trainer.world)
            finite = math.isfinite(found.loss)
            progress.told_loss, progress.told_count, progress.last_loss = 0.0, 0, found.loss if finite else None
            if finite and (progress.best_loss is None or found.loss < progress.best_loss):
                progress.best_step, progress.best_loss, progress.stale = progress.step, found.loss, 0
            else:
                progress.stale += 1
            seconds = round(self.seconds(), 3)
            bits = found.bits_per_byte
            self._record.add(split="val", loss=found.loss, bits_per_byte=bits, lr=lr, seconds=seconds, **facts)
            sample = sample_text(trainer, self.prompt) if finite else ""
            line = Line(progress.step, lr, train_loss, found, seconds, sample)
            if line.sample:
                self._samples += f"--- step {line.step} | val {found.loss:.4f} ---\n{line.sample}\n\n"
        yield from self._write_record()
        yield from self._show()
        yield line

    def _show(self) -> Iterator[Notice]:
        """The samples to read and the picture to look at."""
        what = "samples.txt and loss_curve.png could not be written"
        if not self.trainer.world.leads:
            self._samples = ""
            return
        try:
            with self._bookkeeping():
                self.progress.samples_size = keep_samples(self.out_dir, self._samples, self.progress.samples_size)
                self._samples = ""
                if self.progress.step > 0:  # before that there is no curve, and the first step waits
                    plot_runs([self.out_dir], self.out_dir / "loss_curve.png")
            self._said.discard(what)
        except (OSError, UserError) as error:  # a picture that cannot be written is a UserError
            yield from self._failed(what, error)

    def _save_is_due(self) -> bool:
        every = self.trainer.config.save_every or self.trainer.config.eval_every
        if isinstance(every, float):
            return time.perf_counter() - self._saved_at >= every
        return self.progress.step % every == 0

    def _save(self, wait: bool = False) -> Iterator[Saved | Notice]:
        """Copy the state, and have it written while training goes on: what to resume from, and the weights as
        `model.pt` (`best.pt` where they are the best). With `wait`, until it is on the disk.
        """
        yield from self._saved(wait=True)
        trainer, progress = self.trainer, self.progress
        trainer.world.gather(None)  # the others wait for the disk with patience
        self._read()
        yield from self._write_record()
        with self._bookkeeping():
            self._saved_at = time.perf_counter()
            copies = self._saver.copy(tensors_of(trainer), trainer.world.leads)
            progress.seconds = self.seconds()
            if not trainer.world.leads:
                return
            is_best = progress.best_loss is not None and progress.best_step == progress.step
            weights, facts = weights_of(trainer, copies), facts_of(trainer, progress)
            where = self.out_dir, self._record, self._record.added, progress.step
            write = partial(write_state, *where, weights, copies, facts, trainer.config.keep, is_best)
            self._saver.start(progress.step, write)
        yield from self._saved(wait)

    def _saved(self, wait: bool = False) -> Iterator[Saved | Notice]:
        """What became of the state being written, once that is known."""
        with self._bookkeeping():
            result = self._saver.finished(wait)
        if result is None:
            return
        self.progress.seconds = self.seconds()
        (step, outcome), what = result, "the state could not be saved"
        if isinstance(outcome, Path):
            self.unsaved = None
            self._said.discard(what)
            yield Saved(step, outcome)
            yield from map(Notice, storage.limits())
        else:
            self.unsaved, self.failed_saves = f"step {step} ({outcome.strerror or outcome})", self.failed_saves + 1
            yield from self._failed(what, outcome)


def first_loss(trainer: Trainer) -> float:
    """Loss of the first batch before any update, in nats per token."""
    with torch.no_grad(), precision(trainer.dtype, trainer.device):
        share, _ = trainer.config.share(trainer.world.size)
        losses = [trainer.forward(x, y, seeds)[1] / (share / len(x)) for x, y, seeds in micro_batches(trainer, 0)]
        return max(float(trainer.world.mean(sum(losses))), 0.0)
