"""Compare training steps on a GPU: ours, the chapter's plain loop, and a transformers GPT-2 of the same shape.

One process builds all sides of a preset, and times each when it is built and then all in turn. The table has tokens per
second, the share of the GPU's rate of matrix products, measured here too, and the peak of its memory beside what `plan`
predicts. A side that fails is reported, and the others go on. `benchmarks/gpu.sh` calls this for each preset.

    python -m benchmarks.gpu [--preset chapter] [--sides plain,ours] [--batch_size 32] [--json FILE] ...

Sides: `plain` in float32, `-bf16` under bfloat16 autocast. `ours` adds up in a fixed order, as training does,
`ours-any-order` does not. `ours-plain-loss` is `ours-compiled` with PyTorch's cross-entropy over all logits at once;
name it right after `ours-compiled`. `llama-124m` is the modern model in the size of `gpt2-124m`, with Muon.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_tables import print_rows, update_seconds, write_profile
from benchmarks.step import plain_batch, settings_of, transformers_model
from llm import GPT
from llm.config import TrainConfig, from_settings, read_toml
from llm.config.counts import count_parameters, flops_per_token
from llm.data import TokenData
from llm.loss import linear_cross_entropy, plain_cross_entropy
from llm.machine.device import describe_device, fixed_order, matrix_rate
from llm.plan.arithmetic import memory_for
from llm.start import build
from llm.tokens.bpe import gpt2
from llm.train import train_step
from llm.training.parts import Parts

SIDES = ("plain", "plain-bf16", "transformers-bf16", "ours", "ours-any-order", "ours-compiled", "ours-plain-loss")
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 512, "batch_size": 4}
UNTIMED = 5  # steps of a side before its first timed one
GIB = 2**30


@dataclass
class Side:
    """One way to make a step. `step` returns the loss as a tensor, and does not wait for the device."""

    name: str
    step: Callable[[int], torch.Tensor]
    parts: Parts | None = None  # of ours
    before: int = 0  # bytes on the device before it was built
    ready_seconds: float = 0.0  # to build it, and for its first step
    peak: int = 0  # bytes
    rates: list[float] = field(default_factory=list)  # tokens per second, of each round
    facts: dict[str, Any] = field(default_factory=dict)
    done: int = 0  # steps


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if unknown := set(args.sides.split(",")) - set(SIDES):
        parser.error(f"--sides: no {', '.join(unknown)}; there are {', '.join(SIDES)}")
    device = torch.device(args.device)
    config = config_of(args.preset, args.batch_size, args.small)
    tokens, text = tokens_for(config.model.vocab_size)
    sides: list[Side] = []
    failed: dict[str, str] = {}
    signal.signal(signal.SIGTERM, stop)
    try:
        for name in args.sides.split(","):
            try:
                sides.append(ready_side(name, config, tokens, device, sides[-1] if sides else None))
                time_side(sides[-1], config, device, args.steps)  # first: compiling may have taken most of the limit
                if name == "ours-compiled" and args.train_seconds:
                    train(sides[-1], device, args.train_seconds)
            except Exception as error:  # the other sides go on
                failed[name] = in_one_line(error)
        timed = [side for side in sides if side.rates]
        for side in (args.rounds - 1) * timed:  # in turn
            time_side(side, config, device, args.steps)
        look_inside(timed, config, device, args.profile)
    except TimeUp:
        failed["the rest"] = "stopped at the time limit"
    except Exception as error:  # what was measured until then is printed
        failed["the rest"] = in_one_line(error)
    rate = matrix_rate(device, torch.bfloat16)
    shared = {"preset": args.preset, "parameters": count_parameters(config.model), "batch_size": config.batch_size}
    shared |= {"block_size": config.model.block_size, "text": text, "matrix_rate": rate}
    shared |= {"device": describe_device(device, torch.bfloat16), "torch": torch.__version__}
    rows = [shared | row(side, config, rate) for side in sides if side.rates]
    rows += [shared | {"side": name, "failed": reason} for name, reason in failed.items()]
    print_rows(rows)
    if args.json:
        with open(args.json, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(each) + "\n" for each in rows)
    sys.exit(1 if failed else 0)


def in_one_line(error: Exception) -> str:
    """Write the stack of an error on stderr, and return it in one line."""
    traceback.print_exception(error)
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:100]}"


class TimeUp(BaseException):
    """The time limit: `timeout` sent SIGTERM. What was measured until then is printed."""


def stop(number: int, frame: object) -> None:
    """Handle SIGTERM once."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise TimeUp


def look_inside(sides: list[Side], config: TrainConfig, device: torch.device, file: str | None) -> None:
    """Measure the optimizer's part of a step of ours, and write where the time of the compiled one goes."""
    for side in sides:
        if side.parts is None:
            continue
        with mode(side.name, device):
            seconds = update_seconds(side.parts, lambda side=side: next_steps(side, 5), device)
            side.facts["update_ms"] = 1000 * seconds
            if file and side.name == "ours-compiled":
                step_seconds = config.tokens_per_step / statistics.median(side.rates)
                write_profile(lambda side=side: next_steps(side, 3), 3, step_seconds, Path(file))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="chapter", help="a preset of ours, or llama-124m")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a side in a round")
    parser.add_argument("--train_seconds", type=float, default=0.0, help="train ours-compiled for so long first")
    parser.add_argument("--profile", metavar="FILE", help="write where the time of a step of ours-compiled goes")
    parser.add_argument("--json", metavar="FILE", help="append a line for each side")
    parser.add_argument("--device", default="cuda", help="cpu tries the program out")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the program out")
    return parser


def config_of(preset: str, batch_size: int | None, small: bool) -> TrainConfig:
    """Return the settings of a preset for steps of one micro-batch, with a short warm-up."""
    if preset == "llama-124m":
        shared = {name: value for name, value in read_toml("gpt2-124m").items() if name not in ("bias", "gelu")}
        config = from_settings(shared | {"vocab_size": 50257, "arch": "llama", "optimizer": "muon"})
    else:
        config = settings_of(preset)
    changes = {"gradient_accumulation_steps": 1, "warmup_steps": 20, "batch_size": batch_size or config.batch_size}
    return from_settings(changes | (SMALL if small else {}), config)


def tokens_for(vocab_size: int) -> tuple[Any, str]:
    """Return tokens and what they are: GPT-2's, of a text, where the vocabulary has them; else bytes or random."""
    if vocab_size < 256:
        return np.random.default_rng(0).integers(0, vocab_size, 2_000_000).astype(np.uint16), "random tokens"
    cache = Path(os.environ.get("LOSSCURVE_CACHE", ""))
    file, name = cache / "tinyshakespeare" / "input.txt", "tiny Shakespeare"
    if not file.is_file():
        file, name = Path("docs/decisions.md"), "docs/decisions.md"
    if vocab_size >= 50257 and (cache / "tiktoken").is_dir():
        return gpt2().encode(file.read_text(encoding="utf-8")).astype(np.uint16), f"GPT-2's tokens of {name}"
    return np.frombuffer(file.read_bytes(), np.uint8).astype(np.uint16), f"the bytes of {name}"


def ready_side(name: str, config: TrainConfig, tokens: Any, device: torch.device, previous: Side | None) -> Side:
    """Return a side that made its first steps, with their peak of memory and what it took to get ready."""
    start = time.perf_counter()
    before = allocated(device)
    if name == "ours-plain-loss":
        if previous is None or previous.name != "ours-compiled":
            raise ValueError("name ours-plain-loss right after ours-compiled")
        side = Side(name, previous.step, previous.parts, previous.before)
    elif name.startswith("ours"):
        parts = our_parts(config, tokens, device, compiles=name == "ours-compiled")
        side = Side(name, lambda number: train_step(parts, number).loss, parts, before)
    else:
        peer = transformers_model(config.model) if name.startswith("transformers") else GPT(config.model)
        side = Side(name, plain_step(peer.to(device), config, tokens, device, name.endswith("bf16")), None, before)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with mode(name, device):
        next_steps(side, 1)
        side.ready_seconds = time.perf_counter() - start
        side.facts["first_loss"] = next_steps(side, UNTIMED)
    side.peak = torch.cuda.max_memory_allocated() - side.before if device.type == "cuda" else 0
    return side


def our_parts(config: TrainConfig, tokens: Any, device: torch.device, compiles: bool) -> Parts:
    """Return the parts of our step. Raises RuntimeError where it cannot be compiled; a run would go on without."""

    def refuse(reason: str) -> None:
        raise RuntimeError(reason)

    data = TokenData(Path(), tokens, tokens, config.model.vocab_size, True, "random", {})
    with fixed_order(device):
        parts = build.build(config, data, None, device, torch.bfloat16)
        parts.model.train()
        if compiles:
            build.compile_forward(parts, refuse)
    return parts


def plain_step(
    model: torch.nn.Module, config: TrainConfig, tokens: Any, device: torch.device, low: bool
) -> Callable[[int], torch.Tensor]:
    """Return a step of the chapter's loop: all logits at once, PyTorch's cross-entropy, its default AdamW."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.max_lr, betas=(config.beta1, config.beta2))

    def step(number: int) -> torch.Tensor:
        for group in optimizer.param_groups:
            group["lr"] = config.max_lr * min(1.0, number / 100)
        x, y = (ids.to(device) for ids in plain_batch(config, tokens))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low):
            found = model(x)
            logits = found[0] if isinstance(found, tuple) else found.logits
            loss = torch.nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@contextmanager
def mode(name: str, device: torch.device) -> Iterator[None]:
    """Set what is global in PyTorch, and the function of the loss, as a side has them."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name.startswith("ours") else "highest")  # TF32, as our runs have it
    has_order = name.startswith("ours") and name != "ours-any-order"
    if name == "ours-plain-loss":
        build.linear_cross_entropy = lambda *given: plain_cross_entropy(*given[:3])  # no side has a teacher, the fourth
    try:
        with fixed_order(device if has_order else torch.device("cpu")):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        build.linear_cross_entropy = linear_cross_entropy


def next_steps(side: Side, count: int) -> float:
    """Make the next steps of a side and wait for the device; return the last loss."""
    for _ in range(count):
        loss = side.step(side.done)
        side.done += 1
    return loss.item()


def train(side: Side, device: torch.device, seconds: float) -> None:
    """Train a side for about `seconds`; note the steps, and the mean loss of the last ten."""
    start = time.perf_counter()
    losses: list[float] = []
    with mode(side.name, device):
        while (spent := time.perf_counter() - start) < seconds:
            recent = [side.step(side.done + number) for number in range(10)]
            side.done += 10
            losses.append(torch.stack(recent).mean().item())
            side.facts |= {"trained_steps": side.done, "trained_seconds": spent, "trained_loss": losses[-1]}


def time_side(side: Side, config: TrainConfig, device: torch.device, steps: int) -> None:
    """Add the tokens per second of `steps` steps to the rates of a side."""
    with mode(side.name, device):
        start = time.perf_counter()
        side.facts["loss"] = next_steps(side, steps)
        side.rates.append(steps * config.tokens_per_step / (time.perf_counter() - start))


def allocated(device: torch.device) -> int:
    """Return the bytes of the device's memory that tensors hold."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def row(side: Side, config: TrainConfig, rate: float) -> dict[str, Any]:
    """Return the figures of a side; `rate` in FLOP/s."""
    median = statistics.median(side.rates)
    planned = sum(memory_for(config, False, 2).values())
    return {
        "side": side.name,
        "failed": None,
        "tokens_per_second": median,
        "low": min(side.rates),
        "high": max(side.rates),
        "step_ms": 1000 * config.tokens_per_step / median,
        "utilisation": median * flops_per_token(config.model) / rate,
        "peak_gib": side.peak / GIB,
        "planned_gib": planned / GIB if side.parts is not None else None,
        "ready_seconds": side.ready_seconds,
        **side.facts,
    }


if __name__ == "__main__":
    main()
