"""One step, and the loop around it.

A step takes its batch, sets its learning rate, runs forward and backward over its micro-batches, and
lets the optimizer step. `steps` yields what each step did; `Training` evaluates, records, samples,
draws and saves around those facts.

B windows of a micro-batch, T block_size.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm import checkpoint, metrics, storage
from llm.config import TrainConfig
from llm.data import TokenData, batch_at
from llm.device import precision
from llm.errors import Failure, UserError
from llm.evaluate import Evaluation, evaluate
from llm.generate import continue_text
from llm.model import GPT
from llm.optim import optimizer_tensors, restore_optimizer
from llm.plot import plot_runs
from llm.schedule import lr_at
from llm.tokenizer import Tokenizer

REMEDY = "start another run with a lower --max_lr, --grad_clip 1 or --dtype float32"


@dataclass
class Trainer:
    """What a step works on. `forward` is the model, perhaps compiled or wrapped for many processes."""

    config: TrainConfig
    model: GPT
    forward: Callable[..., Any]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # for float16; lets everything through where it is not enabled
    data: TokenData
    tokenizer: Tokenizer | None  # None: its vocabulary is not to be had, so no samples and no bits per byte
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Step:
    """One finished step. `loss` (mean over the batch, nats per token) stays on the device until it is read."""

    step: int  # completed updates
    loss: Tensor
    grad_norm: Tensor | None


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


@dataclass
class Progress:
    """Where a run stands: saved with the weights, so that a resumed run goes on as if never stopped."""

    step: int = 0  # completed updates
    tokens: int = 0  # trained on
    seconds: float = 0.0  # since the start, evaluations and all
    bookkeeping: float = 0.0  # seconds of these spent on anything but steps
    logged: int = 0  # step of the last training record
    logged_loss: float = 0.0  # sum of the losses since then
    told: int = 0  # step of the last evaluation
    told_loss: float = 0.0  # sum of the losses from then to the last training record
    best_step: int = 0
    best_loss: float | None = None  # lowest validation loss, nats per token
    last_loss: float | None = None  # newest validation loss
    stale: int = 0  # evaluations since the best
    samples_size: int = 0  # bytes of samples.txt


def micro_batches(trainer: Trainer, step: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The batch of `step` in micro-batches: x and y (B, T), dropout seeds (B,), on the device."""
    config = trainer.config
    batch = batch_at(trainer.data.train, config.seed, step, config.windows_per_step, config.model.block_size)
    for start in range(0, config.windows_per_step, config.batch_size):
        rows = slice(start, start + config.batch_size)
        x, y, seeds = (torch.from_numpy(part[rows]).to(trainer.device) for part in (batch.x, batch.y, batch.seeds))
        yield x, y, seeds


def train_step(trainer: Trainer, step: int, want_norm: bool = False) -> Step:
    """Update number `step`, counted from 0. The gradient's norm is taken if asked for, or to clip it."""
    config, optimizer, scaler = trainer.config, trainer.optimizer, trainer.scaler
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step, config)
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=trainer.device)
    for x, y, seeds in micro_batches(trainer, step):
        with precision(trainer.dtype, trainer.device):
            loss = trainer.forward(x, y, seeds)[1] / config.gradient_accumulation_steps
        scaler.scale(loss).backward()
        total += loss.detach()
    norm = None
    if want_norm or config.grad_clip > 0:
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), config.grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    return Step(step + 1, total, norm)


def steps(trainer: Trainer, start: int) -> Iterator[Step]:
    """Sample a batch, forward, backward, step, repeat: from `start` completed updates to `max_steps`."""
    trainer.model.train()
    for step in range(start, trainer.config.max_steps):
        yield train_step(trainer, step, want_norm=(step + 1) % trainer.config.log_every == 0)


class Training:
    """A run under way: iterate over it, and it trains, yielding each step, evaluation and saved state.

    `stop` is asked after each step; when it says so, the state is saved and the run ends in good order.
    Afterwards `reason` says why it ended: "done", "max_time", "patience" or "interrupted".
    Raises Failure, saving nothing, where the loss is no longer a finite number.
    """

    def __init__(self, trainer: Trainer, out_dir: Path, progress: Progress, prompt: str) -> None:
        self.trainer, self.out_dir, self.progress, self.prompt = trainer, out_dir, progress, prompt
        self.stop: Callable[[], bool] = lambda: False
        self.reason = "done"
        self.token_bytes = trainer.tokenizer.token_bytes() if trainer.tokenizer else None
        self._running = torch.tensor(progress.logged_loss, device=trainer.device)  # losses not yet logged
        self._began = time.perf_counter() - progress.seconds
        self._pace = (0.0, 0)  # seconds of steps and tokens at the last training record

    def __iter__(self) -> Iterator[Step | Line | Saved]:
        config, progress = self.trainer.config, self.progress
        save_every = config.save_every or config.eval_every
        self._pace = (self._stepping(), progress.tokens)
        if progress.step == 0:
            yield self._tell()
            yield self._save()
        for step in steps(self.trainer, progress.step):
            progress.step, progress.tokens = step.step, progress.tokens + config.tokens_per_step
            self._running += step.loss
            yield step
            done, late = step.step == config.max_steps, self.seconds() >= (config.max_time or math.inf)
            telling = step.step % config.eval_every == 0 or done or late
            if telling or step.step % config.log_every == 0:
                self._log(step)
            if telling:
                yield self._tell()
            worn = progress.stale >= (config.patience or math.inf)
            asked = self.stop()
            improved = telling and progress.stale == 0
            if done or late or worn or asked or improved or step.step % save_every == 0:
                yield self._save()
            if done or late or worn or asked:
                self.reason = "done" if done else "max_time" if late else "patience" if worn else "interrupted"
                return

    def seconds(self) -> float:
        """Since the start of the run, what came before a resume included."""
        return time.perf_counter() - self._began

    def _stepping(self) -> float:
        return self.seconds() - self.progress.bookkeeping

    @contextmanager
    def _bookkeeping(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.progress.bookkeeping += time.perf_counter() - start

    def _log(self, step: Step) -> None:
        """Record the mean loss since the last record; this is where the device is waited for."""
        progress, loss = self.progress, self._running.item()
        if not math.isfinite(loss):
            raise Failure(f"the loss is not a finite number between steps {progress.logged} and {step.step}; {REMEDY}")
        then, tokens = self._pace
        self._pace = (self._stepping(), progress.tokens)
        with self._bookkeeping():
            metrics.append(
                self.out_dir,
                step=step.step,
                split="train",
                loss=loss / (step.step - progress.logged),
                lr=lr_at(step.step, self.trainer.config),
                grad_norm=None if step.grad_norm is None else step.grad_norm.item(),
                tokens=progress.tokens,
                seconds=round(self.seconds(), 3),
                tokens_per_second=round((progress.tokens - tokens) / (self._pace[0] - then), 1),
            )
        progress.told_loss += loss
        progress.logged, progress.logged_loss = step.step, 0.0
        self._running.zero_()

    def _tell(self) -> Line:
        """Evaluate, record, sample and draw."""
        with self._bookkeeping():
            trainer, config, progress = self.trainer, self.trainer.config, self.progress
            lr, facts = lr_at(progress.step, config), {"step": progress.step, "tokens": progress.tokens}
            if progress.step == 0:
                train_loss = first_loss(trainer)
                metrics.append(self.out_dir, split="train", loss=train_loss, lr=lr, seconds=0.0, **facts)
            else:
                train_loss = progress.told_loss / (progress.step - progress.told)
            with precision(trainer.dtype, trainer.device):
                found = evaluate(
                    trainer.model, trainer.data.val, config.model.block_size, config.eval_tokens, self.token_bytes
                )
            if not math.isfinite(found.loss):
                raise Failure(f"the validation loss is not a finite number at step {progress.step}; {REMEDY}")
            progress.told, progress.told_loss, progress.last_loss = progress.step, 0.0, found.loss
            if progress.best_loss is None or found.loss < progress.best_loss:
                progress.best_step, progress.best_loss, progress.stale = progress.step, found.loss, 0
            else:
                progress.stale += 1
            seconds = round(self.seconds(), 3)
            metrics.append(
                self.out_dir,
                split="val",
                loss=found.loss,
                bits_per_byte=found.bits_per_byte,
                lr=lr,
                seconds=seconds,
                **facts,
            )
            sample = sample_text(trainer, self.prompt)
            line = Line(progress.step, lr, train_loss, found, seconds, sample)
            if sample:
                progress.samples_size = keep_sample(self.out_dir, line, progress.samples_size)
            plot_runs([self.out_dir], self.out_dir / "loss_curve.png")
        return line

    def _save(self) -> Saved:
        """Write the state to resume from, and the weights as `model.pt` (`best.pt` where they are the best)."""
        trainer, progress = self.trainer, self.progress
        with self._bookkeeping():
            progress.seconds, progress.logged_loss = self.seconds(), self._running.item()
            if not math.isfinite(progress.logged_loss):
                raise Failure(f"the loss is not a finite number at step {progress.step}; {REMEDY}")
            is_best = progress.best_step == progress.step
            for name in ("model.pt", "best.pt") if is_best else ("model.pt",):
                with storage.writing(self.out_dir / name) as file:
                    torch.save(trainer.model.state_dict(), file)
            groups: checkpoint.Groups = {
                "model": dict(trainer.model.named_parameters()),
                "optimizer": optimizer_tensors(trainer.model, trainer.optimizer),
            }
            facts = {"progress": asdict(progress), "scaler": trainer.scaler.state_dict(), "data": trainer.data.hashes}
            folder = checkpoint.save_state(self.out_dir, progress.step, groups, facts, trainer.config.keep, is_best)
        progress.seconds = self.seconds()
        return Saved(progress.step, folder)


def restore(trainer: Trainer, groups: checkpoint.Groups, facts: dict[str, Any]) -> Progress:
    """Put a saved state into the trainer's parts; returns where the run stood.

    Raises UserError where the state does not fit the model or the data.
    """
    if facts.get("data") != trainer.data.hashes:
        raise UserError(f"{trainer.data.folder}: not the data this run was trained on; give the right --data_dir")
    parameters = dict(trainer.model.named_parameters())
    saved = groups.get("model", {})
    if {k: v.shape for k, v in saved.items()} != {k: p.shape for k, p in parameters.items()}:
        raise UserError("saved state: its weights do not fit the settings in config.toml")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(saved[name])
    restore_optimizer(trainer.model, trainer.optimizer, groups.get("optimizer", {}))
    trainer.scaler.load_state_dict(facts["scaler"])
    return Progress(**facts["progress"])


def first_loss(trainer: Trainer) -> float:
    """Loss of the first batch before any update, in nats per token."""
    with torch.no_grad(), precision(trainer.dtype, trainer.device):
        losses = [float(trainer.forward(x, y, seeds)[1]) for x, y, seeds in micro_batches(trainer, 0)]
    return sum(losses) / len(losses)


def sample_text(trainer: Trainer, prompt: str) -> str:
    """`prompt` and its continuation, drawn with the run's seed: the same luck at every evaluation."""
    if trainer.tokenizer is None or trainer.config.sample_tokens == 0:
        return ""
    config, model, tokenizer = trainer.config, trainer.model, trainer.tokenizer
    with precision(trainer.dtype, trainer.device):
        drawn = [token for (token,) in continue_text(model, tokenizer, prompt, config.sample_tokens, config.seed)]
    model.train()
    return prompt + tokenizer.decode(drawn)


def keep_sample(out_dir: Path, line: Line, size: int) -> int:
    """Write the sample of an evaluation after the first `size` bytes of samples.txt; returns its new size."""
    path = out_dir / "samples.txt"
    before = path.read_bytes()[:size] if path.exists() else b""
    head = f"--- step {line.step} | val {line.evaluation.loss:.4f} ---\n"
    content = before + (head + line.sample + "\n\n").encode()
    storage.write_bytes(path, content)
    return len(content)
