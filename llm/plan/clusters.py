"""From one accelerator to a thousand: the memory, speed, time and cost of a run on N of them, predicted.

Pure functions of the settings, the accelerator and N; no machine is measured. `assumptions` lists every assumption in
words, and docs/plan.md has the formulas. N: ranks, one process and one accelerator each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llm.config import GPTConfig, TrainConfig, from_settings
from llm.config.counts import count_hidden_matrices, count_parameters, flops_per_token, muon_flops
from llm.errors import UserError
from llm.plan.accelerators import Accelerator, describe_link
from llm.plan.arithmetic import count_group_parameters, count_validations, memory_for, muon_excess, teacher_excess
from llm.plan.collectives import ddp_messages, fsdp_messages

Parallel = Literal["ddp", "fsdp"]

# bytes per parameter: AdamW reads weight, gradient and two moments, and writes all but the gradient
UPDATE_BYTES = 28

# and Muon one moment less, which it would read and write
MUON_UPDATE_BYTES = 20

# and with ema: reads weight and average, and writes the average
AVERAGE_BYTES = 12

# usable share of an accelerator's memory; the rest is assumed to go to the driver, NCCL's buffers and fragmentation
ROOM = 0.9

# assumed share of the vendor's peak if no rate is given: Llama 3 reached 0.38 to 0.43 on H100s
MFU = 0.4

COUNTS = tuple(2**power for power in range(11))  # 1 to 1,024 accelerators


def refusal(config: TrainConfig, ranks: int, accelerator: Accelerator) -> str | None:
    """Return why a step cannot be split over `ranks`, with the remedy; None if it can."""
    windows = config.windows_per_step
    per_node = accelerator.per_node
    if ranks > per_node and ranks % per_node:
        return f"nproc = {ranks}: a node has {per_node}; give a multiple of {per_node}, or another --nproc_per_node"
    if windows % ranks == 0:
        return None
    next_multiple = math.ceil(windows / ranks) * ranks
    return (
        f"nproc = {ranks}: the {windows} windows of a step are not divisible by it; make batch_size x "
        f"gradient_accumulation_steps {next_multiple}, or give {math.gcd(windows, ranks)}"
    )


def check(config: TrainConfig, ranks: int, accelerator: Accelerator) -> None:
    """Raises UserError if `refusal` has a reason."""
    reason = refusal(config, ranks, accelerator)
    if reason:
        raise UserError(reason)


# ---- memory


def rank_memory(
    config: TrainConfig,
    ranks: int,
    parallel: Parallel,
    on_cpu: bool = False,
    itemsize: int = 2,
    teachers: Sequence[GPTConfig] = (),
) -> dict[str, int]:
    """Return the bytes at peak of one of `ranks` by part, as `plan.arithmetic.memory` counts them.

    `itemsize`: bytes of a number in the matrix products.

    - ddp: each rank has the whole model and its optimizer state (gradients are views of the buckets that are
      all-reduced), and the activations of its own micro-batch.
    - fsdp: weights, gradients and moments, 16 bytes per parameter, are sharded. Beside them a rank holds the root in
      float32 with its gradient, and two groups in flight, with gradients in both precisions (Zhao et al. 2023,
      "PyTorch FSDP"). A rank of several micro-batches keeps whole gradients in float32 until the last one.
    - cpu_offload moves the shards to the host's memory, which on a CPU is the same.
    - Muon's momentum is sharded like the weights. Each rank gathers all matrices for the products of its update.
    - teachers: the first rank has whole ones of these shapes before the first step.

    One rank shards nothing.
    """
    windows, _ = config.share(ranks)
    micro_batch = {"batch_size": min(windows, config.batch_size), "gradient_accumulation_steps": 1}
    of_rank = from_settings(micro_batch, config)
    held = memory_for(of_rank, on_cpu, itemsize)
    if parallel == "fsdp" and ranks > 1:
        _shard(held, config, ranks, itemsize, on_cpu)
    if config.optimizer == "muon":
        held["Muon's update"] = muon_excess(held, config, on_cpu, itemsize)
    if teachers:
        held["teachers"] = teacher_excess(held, of_rank, teachers, on_cpu, itemsize)
    return held


def _shard(held: dict[str, int], config: TrainConfig, ranks: int, itemsize: int, on_cpu: bool) -> None:
    """Replace the bytes of a whole model by those of one rank of fsdp."""
    model = config.model
    groups = count_group_parameters(model)
    for part in held.keys() & {"weights", "gradients", "optimizer state", "average of the weights"}:
        held[part] = 0 if config.cpu_offload and not on_cpu else math.ceil(held[part] / ranks)
    casts_head = itemsize != 4 and not on_cpu
    held["low-precision copies"] = itemsize * model.vocab_size * model.n_embd if casts_head else 0
    held["gathered root"] = 8 * groups["root"]
    held["gathered groups"] = 2 * max(groups["attention"], groups["feed-forward"]) * (2 * itemsize + 4)
    if config.share(ranks)[1] > 1:  # those of the root are counted with it
        held["accumulated gradients"] = 4 * model.n_layer * (groups["attention"] + groups["feed-forward"])


def fits(held: dict[str, int], accelerator: Accelerator) -> bool | None:
    """Return whether the bytes fit in ROOM of the accelerator's memory; None if that memory is not known."""
    if not accelerator.memory:
        return None
    return sum(held.values()) <= ROOM * accelerator.memory


# ---- speed


@dataclass(frozen=True)
class Speed:
    """Seconds that one accelerator takes by itself."""

    token: float  # forward and backward pass of one token
    update: float  # memory traffic of the optimizer, all parameters
    muon: float = 0.0  # Muon's products: each rank computes them all


def speed_of(config: TrainConfig, rate: float, accelerator: Accelerator) -> Speed:
    """Return the parts of a step that runs at `rate` tokens per second, over whole steps of `config`.

    The traffic of the update is computed from the memory bandwidth, a peak. It is at most half of a step, because very
    small models wait for other things. Muon's products take their share of the FLOPs in the rest.
    """
    step = config.tokens_per_step / rate
    count = count_parameters(config.model)
    touched = (UPDATE_BYTES + (AVERAGE_BYTES if config.ema else 0)) * count
    if config.optimizer == "muon":
        touched -= (UPDATE_BYTES - MUON_UPDATE_BYTES) * count_hidden_matrices(config.model)
    update = min(touched / accelerator.memory_bandwidth, step / 2)
    of_tokens = flops_per_token(config.model) * config.tokens_per_step
    of_muon = optimizer_flops(config)
    muon = (step - update) * of_muon / (of_muon + of_tokens)
    return Speed((step - update - muon) / config.tokens_per_step, update, muon)


def optimizer_flops(config: TrainConfig) -> float:
    """Return the FLOPs of the matrix products in one update: none with AdamW."""
    return muon_flops(config.model) if config.optimizer == "muon" else 0.0


def assumed_rate(config: TrainConfig, accelerator: Accelerator, share: float = MFU) -> float:
    """Return the tokens per second of one accelerator at a share of its peak, over whole steps of `config`."""
    of_token = flops_per_token(config.model) + optimizer_flops(config) / config.tokens_per_step
    return share * accelerator.peak / of_token


@dataclass(frozen=True)
class Prediction:
    """A step of a run on `ranks` accelerators. Times are in seconds."""

    ranks: int
    tokens: int  # of all ranks in a step
    step: float
    computing: float  # forward and backward pass of a rank
    update: float  # the optimizer of a rank
    messages: float  # all collectives
    waiting: float  # collectives that do not overlap with computing
    efficiency: float  # against N accelerators that share the work of a step evenly and send nothing

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step


def predicted(
    config: TrainConfig, ranks: int, parallel: Parallel, accelerator: Accelerator, speed: Speed, itemsize: int = 2
) -> Prediction:
    """Return the prediction of a step of `config` on `ranks` accelerators of that speed.

    `itemsize`: bytes of a number in the matrix products. With ddp, each rank updates all parameters; with fsdp, those
    of its shard, but each rank makes Muon's products for all. Raises UserError if the step cannot be split over
    `ranks`.
    """
    check(config, ranks, accelerator)
    windows, micro_batches = config.share(ranks)
    computing = windows * config.model.block_size * speed.token
    overlapped = accelerator.overlap * computing / micro_batches
    forward = overlapped / 3
    backward = overlapped * 2 / 3
    if ranks == 1:
        messages = waiting = 0.0
    elif parallel == "ddp":
        messages, waiting = ddp_messages(config, ranks, accelerator, backward)
    else:
        messages, waiting = fsdp_messages(config, ranks, accelerator, itemsize, forward, backward)
    update = speed.muon + (speed.update / ranks if parallel == "fsdp" else speed.update)
    step = computing + update + waiting
    ideal = computing + (speed.update + speed.muon) / ranks
    return Prediction(
        ranks=ranks,
        tokens=config.tokens_per_step,
        step=step,
        computing=computing,
        update=update,
        messages=messages,
        waiting=waiting,
        efficiency=min(1.0, ideal / step),
    )


# ---- a run, and many sizes of it


def run_time(config: TrainConfig, found: Prediction, speed: Speed, validated: float) -> dict[str, float]:
    """Return the seconds by part of training on all tokens of `config`, at the pace of the step `found`.

    `found` is a step of `config` or of `weak`. Evaluations, forward passes over `validated` tokens each, are split over
    the ranks. Samples, saving and starting are not counted.
    """
    forward = speed.token / 3
    return {
        "steps": config.max_steps * config.tokens_per_step / found.tokens_per_second,
        "evaluation": count_validations(config) * validated * forward / found.ranks,
    }


def cost(seconds: float, ranks: int, price: float) -> float:
    """Return the cost of `ranks` accelerators for `seconds`, at a price per accelerator and hour."""
    return seconds / 3600 * ranks * price


def weak(config: TrainConfig, ranks: int) -> TrainConfig:
    """Return `config` with one micro-batch per rank in a step, as weak scaling has it."""
    return from_settings({"gradient_accumulation_steps": ranks}, config)


def simulated(
    config: TrainConfig, parallel: Parallel, accelerator: Accelerator, speed: Speed, growing: bool, itemsize: int = 2
) -> list[Prediction]:
    """Return a prediction for each of COUNTS that the run can be split over.

    Strong scaling keeps the step as it is. Weak scaling (`growing`) has one micro-batch per accelerator.
    """
    found = []
    for count in COUNTS:
        run = weak(config, count) if growing else config
        if refusal(run, count, accelerator) is None:
            found.append(predicted(run, count, parallel, accelerator, speed, itemsize))
    return found


def assumptions(accelerator: Accelerator, parallel: Parallel) -> list[str]:
    """Return the assumptions of the predictions, one sentence each."""
    per_node = accelerator.per_node
    node = f"{per_node} a node, {describe_link(accelerator.link)} inside" if per_node > 1 else "one a node"
    network = f"{describe_link(accelerator.network)} between nodes ({accelerator.node})"
    collectives = {
        "ddp": "ring all-reduce, between nodes by trees where faster",
        "fsdp": "ring all-gather and reduce-scatter",
    }
    overlap = {
        "ddp": "overlaps with the last backward pass, except the gradients of the embeddings",
        "fsdp": "overlaps with the pass that needs it, except the root (embeddings, norms, head)",
    }
    when = overlap[parallel] if accelerator.overlap else "never overlaps with computing, since the same cores do both"
    return [
        f"{node}; {network}; links of a data sheet are peaks",
        f"{collectives[parallel]}; {when}",
        "a rank computes a token as fast in its share of the step as one accelerator in all of it; small shares are "
        "slower",
        "no rank waits for a slower one, no link is shared with other jobs, reading tokens takes no time",
        f"{1 - ROOM:.0%} of the memory is left to drivers, NCCL's buffers and fragmentation",
    ]
