"""Predict memory, speed, time and cost of a run on many accelerators, from the flags of `plan`."""

import argparse
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm.commands.flags import warn
from llm.config import GPTConfig, TrainConfig, from_settings
from llm.config.counts import flops_per_token, forward_flops_per_token
from llm.errors import UserError
from llm.plan import accelerators, arithmetic, clusters
from llm.plan.clusters import Prediction
from llm.plan.text_size import with_text
from llm.start.sources import open_sources

if TYPE_CHECKING:
    from llm.plan.accelerators import Accelerator
    from llm.plan.clusters import Parallel, Speed


Tables = dict[str, list[Prediction]]  # by "strong" and "weak" scaling


@dataclass(frozen=True)
class ScalePlan:
    """A run on many accelerators and its prediction. Sizes are in bytes, times in seconds."""

    config: TrainConfig
    text_tokens: int  # of the training split
    teachers: Sequence[GPTConfig]  # the shapes of the models that the run learns from
    accelerator: "Accelerator"
    rate: float  # tokens per second of one accelerator
    rate_source: str
    number_size: int  # bytes of a number in the matrix products
    speed: "Speed"
    parallel: "Parallel"
    memory: dict[str, dict[str, int]]  # bytes of one rank, by way of sharing and by part
    prediction: "Prediction"
    price: float | None  # of one accelerator for an hour

    def seconds(self, prediction: "Prediction") -> dict[str, float]:
        """Return the seconds of the run by part, at the pace of `prediction`, its own or one of a table."""
        val_fraction = self.config.val_fraction
        val_tokens = self.text_tokens * val_fraction / (1 - val_fraction)
        found = clusters.run_time(self.config, prediction, self.speed, min(val_tokens, self.config.eval_tokens))
        if self.teachers:  # the first rank lets them predict, while the others wait
            passes = 2 * sum(map(forward_flops_per_token, self.teachers)) / flops_per_token(self.config.model)
            found["teachers"] = passes * self.text_tokens * self.speed.token
        return found


def make_plan(args: argparse.Namespace, config: TrainConfig, given: Collection[str]) -> ScalePlan:
    """Return the plan that the flags ask for; `given`: the names of the settings that were given.

    Raises UserError if the run cannot be split so, or a flag is missing.
    """
    sources = open_sources(config, warn, given)
    config, text = with_text(sources, given)
    teachers = [teacher.config for teacher in sources.teachers]
    del sources  # their weights are not needed while this machine is measured
    if args.accelerator:
        accelerator = accelerators.ACCELERATORS[args.accelerator]
        number_size = 4 if config.dtype == "float32" else 2
    else:
        accelerator, number_size = describe_this_machine(config)
    accelerator = accelerators.with_links(accelerator, args.bandwidth, args.network_bandwidth, args.nproc_per_node)
    ranks = args.nproc or 1
    clusters.check(config, ranks, accelerator)
    rate, rate_source = rate_of_one(args, config, accelerator, number_size)
    speed = clusters.speed_of(config, rate, accelerator)
    memory = memory_of_rank(config, ranks, accelerator, number_size, teachers)
    is_too_large = clusters.fits(memory["ddp"], accelerator) is False
    parallel: Parallel = "fsdp" if is_too_large and not args.parallel else config.parallel
    prediction = clusters.predicted(config, ranks, parallel, accelerator, speed, number_size)
    return ScalePlan(
        config,
        text.tokens,
        teachers,
        accelerator,
        rate,
        rate_source,
        number_size,
        speed,
        parallel,
        memory,
        prediction,
        args.price,
    )


def make_tables(plan: ScalePlan) -> Tables:
    """Return the predictions for 1 to 1,024 accelerators, by strong and by weak scaling."""

    def simulate(is_weak: bool) -> list["Prediction"]:
        return clusters.simulated(plan.config, plan.parallel, plan.accelerator, plan.speed, is_weak, plan.number_size)

    return {"strong": simulate(False), "weak": simulate(True)}


def memory_of_rank(
    config: TrainConfig, ranks: int, accelerator: "Accelerator", number_size: int, teachers: Sequence[GPTConfig]
) -> dict[str, dict[str, int]]:
    """Return the bytes of one rank by part, for each way to share the model and the other settings of `config`."""

    def count(parallel: "Parallel", **more: bool) -> dict[str, int]:
        return clusters.rank_memory(
            from_settings(more, config), ranks, parallel, accelerator.is_cpu, number_size, teachers
        )

    return {
        "ddp": count("ddp"),
        "fsdp": count("fsdp"),
        "fsdp, activation_checkpointing": count("fsdp", activation_checkpointing=True),
        "fsdp, that and cpu_offload": count("fsdp", activation_checkpointing=True, cpu_offload=True),
    }


def describe_this_machine(config: TrainConfig) -> tuple["Accelerator", int]:
    """Return machines like this one as accelerators, and the bytes of a number in the matrix products.

    Raises UserError on a GPU.
    """
    from llm.machine.device import choose_device, choose_dtype

    device = choose_device(config.device)
    if device.type != "cpu":
        raise UserError("accelerator: the links and memory of this GPU are not known; give --accelerator")
    number_size = choose_dtype(config.dtype, device).itemsize
    return accelerators.this_machine(float(arithmetic.machine_memory() or 0), measure_memory_rate()), number_size


def measure_memory_rate() -> float:
    """Return the bytes per second that this machine reads and writes: the best of three copies of 256 MiB."""
    import time

    import torch

    source = torch.ones(2**26)
    target = torch.empty_like(source)
    target.copy_(source)  # the first copy touches the pages, and is not timed
    times = []
    for _ in range(3):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(times)


def rate_of_one(
    args: argparse.Namespace, config: TrainConfig, accelerator: "Accelerator", number_size: int
) -> tuple[float, str]:
    """Return the tokens per second of one accelerator, and their source: given, measured here, or a share of the peak.

    Raises UserError if the rate can be neither measured nor assumed.
    """
    from llm.plan.timing import fits, probe

    if args.tokens_per_second_per_device:
        return args.tokens_per_second_per_device, "given"
    if not args.accelerator:
        if not fits(config):
            raise UserError(
                "accelerator: a step of one window does not fit in the memory here; give --accelerator or "
                "--tokens_per_second_per_device"
            )
        rate = config.tokens_per_step / probe(config).step
        return rate, "measured just now, one process with all its threads"
    if number_size == 4:
        raise UserError("dtype = 'float32': the vendor's peak is for bfloat16; give --tokens_per_second_per_device")
    share = args.mfu or clusters.MFU
    source = f"{share:.0%} of the vendor's {accelerator.peak / 1e12:g} TFLOP/s, {'given' if args.mfu else 'assumed'}"
    return clusters.assumed_rate(config, accelerator, share), source
