"""Checks of the CUDA path that need a GPU: parity with the CPU, refused steps, and one process under torchrun.

    python -m benchmarks.gpu_checks machine
    python -m benchmarks.gpu_checks parity [--few]
    python -m benchmarks.gpu_checks refused [--device cuda]
    python -m benchmarks.gpu_checks torchrun [--text FILE]

Each prints a line for each check; exit code 1 if one failed.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from llm.checks import doctor, prove
from llm.checks.compare_runs import run_differences
from llm.checks.one_step import SHAPES, differences, one_step, tiny_model
from llm.config import from_settings
from llm.data import TokenData
from llm.machine.device import DTYPES, choose_device, describe_device, fixed_order, matrix_rate
from llm.optim import make_optimizer
from llm.train import train_step
from llm.training.parts import Parts

# largest differences of loss (nats per token), gradient and update (shares) from the CPU in float32
ALLOWED = {"float32": (1e-4, 1e-3, 2e-2), "bfloat16": (1e-2, 3e-2, 0.5)}
MUST_AGREE = 2e-2  # nats per token, of runs that add up in another order, after 60 steps in bfloat16
TOO_LARGE = 2.0**40  # a scale of the loss that overflows float16

Found = Iterator[tuple[str, bool, str]]  # name, whether it is good, figures


def main() -> None:
    args = make_parser().parse_args()
    device = choose_device(args.device)
    checks: dict[str, Callable[[], Found]] = {
        "machine": lambda: machine(device),
        "parity": lambda: parity(device, args.few),
        "refused": lambda: refused(device),
        "torchrun": lambda: torchrun(args.text, device),
    }
    failed = 0
    with fixed_order(device):
        for name, is_good, figures in checks[args.check]():
            print(f"{'ok' if is_good else 'FAILED':<7}{name:<44}{figures}", flush=True)
            failed += not is_good
    sys.exit(1 if failed else 0)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=("machine", "parity", "refused", "torchrun"))
    parser.add_argument("--device", default="cuda", help="cpu tries the program out")
    parser.add_argument("--few", action="store_true", help="with dropout only, and compile one shape only")
    parser.add_argument("--text", default="docs/decisions.md", help="what torchrun's runs train on")
    return parser


def machine(device: torch.device) -> Found:
    """Check that what training imports is there, and describe the card."""
    packages = doctor.packages()
    yield "packages", packages.good is True, packages.message
    for name in ("transformers", "triton"):
        is_there = importlib.util.find_spec(name) is not None
        yield name, True, importlib.metadata.version(name) if is_there else "absent: what needs it will fail"
    cache = Path(os.environ.get("LOSSCURVE_CACHE", ""))
    for name in ("tinyshakespeare", "tiktoken"):
        is_there = (cache / name).is_dir()
        yield name, True, f"{cache / name}" if is_there else "not in LOSSCURVE_CACHE, so bytes of docs/decisions.md"
    rates = {dtype: matrix_rate(device, getattr(torch, dtype)) / 1e12 for dtype in ("float32", "bfloat16")}
    figures = ", ".join(f"{rate:.1f} TFLOP/s in {dtype}" for dtype, rate in rates.items())
    yield describe_device(device, torch.bfloat16).partition(",")[0], True, figures
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        cores = f"{properties.multi_processor_count} multiprocessors"
        driver = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        yield "card", True, f"{properties.total_memory / 2**30:.1f} GiB, {cores}, {driver}, {os.cpu_count()} processors"


def parity(device: torch.device, few: bool) -> Found:
    """Compare one update on the device with the same on the CPU in float32."""
    cpu = torch.device("cpu")
    sides = sorted(itertools.product((False, True), SHAPES, ALLOWED, (0.0, 0.1)))  # what is not compiled comes first
    for compiles, arch, dtype, dropout in sides:
        if dropout == 0.0 and (compiles or few):
            continue
        if compiles and few and (arch, dtype) != ("llama", "bfloat16"):
            continue
        name = f"{arch}, {dtype}, dropout {dropout:g}{', compiled' if compiles else ''}"
        try:
            found = differences(one_step(cpu, arch, dropout), one_step(device, arch, dropout, dtype, compiles))
        except Exception as error:
            yield failure(name, error)
            continue
        is_good = all(value <= limit for value, limit in zip(found, ALLOWED[dtype], strict=True))
        loss, gradient, update = found
        yield name, is_good, f"loss {loss:.1e} nats, gradient {gradient:.1e}, update {update:.1e} of it"


def refused(device: torch.device) -> Found:
    """Check that a step that is not finite changes nothing, and that float16's loss scaling recovers and trains."""
    for optimizer in ("adamw", "muon"):
        try:
            yield from refused_by(optimizer, device)
        except Exception as error:
            yield failure(optimizer, error)


def refused_by(optimizer: str, device: torch.device) -> Found:
    """Check both with one optimizer."""
    parts = tiny_parts(optimizer, device, "bfloat16", 1.0)
    with torch.no_grad():
        next(iter(parts.model.h[0].parameters())).fill_(torch.inf)
    before = weights(parts)
    step = train_step(parts, 0)
    is_same = bool(step.refused) and all(map(torch.equal, before, weights(parts)))
    yield f"{optimizer}: an infinite weight", is_same, f"loss {step.loss.item():g}, the others unchanged: {is_same}"

    parts = tiny_parts(optimizer, device, "float16", TOO_LARGE)
    before = weights(parts)
    first = train_step(parts, 0).loss.item()
    is_same = all(map(torch.equal, before, weights(parts))) and parts.scaler.get_scale() == TOO_LARGE / 2
    yield f"{optimizer}: float16 overflows", is_same, f"weights unchanged and the scale halved: {is_same}"
    losses = [train_step(parts, number).loss.item() for number in range(1, 80)]
    figures = f"loss {first:.3f} to {losses[-1]:.3f} in 80 steps, scale {parts.scaler.get_scale():g}"
    yield f"{optimizer}: float16 trains", losses[-1] < first - 0.5, figures


def tiny_parts(optimizer: str, device: torch.device, dtype: str, scale: float) -> Parts:
    """Return the parts of a run of a tiny llama on a text of few letters."""
    recipe = {"batch_size": 8, "max_steps": 100, "warmup_steps": 0, "dtype": dtype, "optimizer": optimizer}
    config = from_settings({"vocab_size": 257, "block_size": 32, "max_lr": 1e-2} | SHAPES["llama"] | recipe)
    tokens = np.random.default_rng(0).integers(0, 16, 4096).astype(np.uint16)
    data = TokenData(Path(), tokens, tokens, 257, True, "random", {})
    torch.manual_seed(config.seed)
    model = tiny_model(config.model).to(device).train()
    scaler = torch.amp.GradScaler(device.type, init_scale=scale, enabled=dtype == "float16")
    made = make_optimizer(model, config, DTYPES[dtype])
    return Parts(config, model, model, made, scaler, data, None, device, DTYPES[dtype])


def weights(parts: Parts) -> list[torch.Tensor]:
    """Return copies of the model's parameters."""
    return [p.detach().clone() for p in parts.model.parameters()]


def torchrun(text: str, device: torch.device) -> Found:
    """Compare one process without torchrun with one under it, with DDP and with FSDP, all at the same time."""
    shape = ["--n_layer=4", "--n_head=4", "--n_embd=128", "--block_size=128", "--batch_size=16", "--tokenizer=byte"]
    recipe = ["--max_steps=60", "--eval_every=30", "--warmup_steps=10", "--max_lr=1e-3", "--sample_tokens=8"]
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--text={text}", f"--data_dir={folder}/data", f"--device={device.type}", *shape, *recipe]
        prove.finish(prove.start([*flags, f"--out_dir={folder}/alone"]))  # prepares the text
        started = {
            kind: prove.start([*flags, "--nproc=1", f"--parallel={kind}", f"--out_dir={folder}/{kind}"])
            for kind in ("ddp", "fsdp")
        }
        for kind, process in started.items():
            try:
                prove.finish(process)
                loss, _ = run_differences(Path(folder, "alone"), Path(folder, kind))
                yield f"torchrun, {kind}, one process", loss <= MUST_AGREE, f"losses within {loss:.1e} of a run alone"
            except Exception as error:
                yield failure(f"torchrun, {kind}, one process", error)


def failure(name: str, error: Exception) -> tuple[str, bool, str]:
    """Return the finding of a check that raised."""
    traceback.print_exception(error)
    return name, False, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"


if __name__ == "__main__":
    main()
