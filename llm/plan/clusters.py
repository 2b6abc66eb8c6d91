"""From one accelerator to a thousand: the memory, speed, time and cost of a run on N of them, predicted.

Pure functions of the settings, the accelerator and N; no machine is touched. Every assumption is a sentence of
`assumptions`, and docs/plan.md has the formulas. S: bytes of a message; N: ranks, one process and one accelerator each.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from llm.config import TrainConfig, from_settings
from llm.errors import UserError
from llm.plan.accelerators import GB, Accelerator, Link
from llm.plan.arithmetic import evaluations, flops_per_token, memory_on, parameters

Parallel = Literal["ddp", "fsdp"]


BUCKET = 25 * 2**20  # bytes of gradients that DistributedDataParallel sends together


UPDATE_BYTES = 28  # of a parameter: AdamW reads weight, gradient and two moments and writes all but the gradient


ROOM = 0.9  # of an accelerator's memory: the rest is assumed to go to its driver, NCCL's buffers and holes


MFU = 0.4  # share of the peak that is assumed where no rate is given: Llama 3 reached 0.38 to 0.43 on H100s


COUNTS = tuple(2**power for power in range(11))  # 1 to 1,024 accelerators


def refusal(config: TrainConfig, ranks: int, accelerator: Accelerator) -> str | None:
    """Why the run cannot be split so, with the remedy; None if it can."""
    windows, node = config.windows_per_step, accelerator.per_node
    if ranks > node and ranks % node:
        return f"nproc = {ranks}: nodes hold {node}; give a multiple of {node}, or another --nproc_per_node"
    if windows % ranks == 0:
        return None
    more = math.ceil(windows / ranks) * ranks
    return (
        f"nproc = {ranks}: the {windows} windows of a step do not divide by it; make batch_size x "
        f"gradient_accumulation_steps {more}, or give {math.gcd(windows, ranks)}"
    )


def check(config: TrainConfig, ranks: int, accelerator: Accelerator) -> None:
    """Raises UserError where `refusal` has a reason."""
    if reason := refusal(config, ranks, accelerator):
        raise UserError(reason)


# ---- memory


def groups(config: TrainConfig) -> dict[str, int]:
    """Parameters of what fully_shard gathers at once: attention and feed-forward of a block, and the root with all else
    (embeddings, norms, head)."""
    model, width = config.model, config.model.n_embd
    attention = 4 * width * width + (4 * width if model.bias else 0)
    feed_forward = 2 * model.ffn_mult * width * width + model.ffn_mult * width + width
    whole = sum(parameters(model).values())
    root = whole - model.n_layer * (attention + feed_forward)
    return {"attention": attention, "feed-forward": feed_forward, "root": root}


def rank_memory(
    config: TrainConfig,
    ranks: int,
    parallel: Parallel,
    on_cpu: bool = False,
    size: int = 2,
    activation_checkpointing: bool = False,
    cpu_offload: bool = False,
) -> dict[str, int]:
    """Bytes at peak of one of `ranks` by part, as `plan.memory` counts them; `size` is that of the products' numbers.

    ddp: every rank has all of it (gradients are views of the buckets that are sent), and only the activations of its
    own micro-batch. fsdp: weights, gradients and moments, 16 bytes a parameter, are split; held beside them are the
    root in float32 with its gradient, and two groups on their way, with gradients in both precisions (Zhao et al. 2023,
    "PyTorch FSDP"). activation_checkpointing keeps only the float32 stream into each block, and one block's
    activations (Chen et al. 2016); cpu_offload moves what is split into the host's memory. One rank splits nothing.
    """
    (share, _), model = config.share(ranks), config.model
    micro = from_settings({"batch_size": min(share, config.batch_size), "gradient_accumulation_steps": 1}, config)
    held = memory_on(on_cpu, size, micro)
    if activation_checkpointing:
        one = memory_on(on_cpu, size, from_settings({"n_layer": 1}, micro))["activations"]
        stream = 4 * micro.tokens_per_step * model.n_embd
        held["activations"] = min(held["activations"], one + model.n_layer * stream)
    if parallel == "ddp" or ranks == 1:
        return held
    largest = max(groups(config)["attention"], groups(config)["feed-forward"])
    for part in ("weights", "gradients", "optimizer state"):
        held[part] = 0 if cpu_offload else math.ceil(held[part] / ranks)
    held["low-precision copies"] = 0 if size == 4 or on_cpu else size * model.vocab_size * model.n_embd  # of the head
    return held | {"gathered root": 8 * groups(config)["root"], "gathered groups": 2 * largest * (2 * size + 4)}


def fits(held: dict[str, int], accelerator: Accelerator) -> bool | None:
    """Whether it does, ROOM left; None where the memory is not known."""
    return sum(held.values()) <= ROOM * accelerator.memory if accelerator.memory else None


# ---- messages


def gather(message: float, ranks: int, accelerator: Accelerator) -> float:
    """Seconds of an all-gather, or a reduce-scatter, of `message` bytes in all: along a ring N - 1 hops of S / N bytes,
    (N - 1) (latency + S / N / bandwidth) (Thakur et al. 2005; Patarasuk & Yuan 2009). With several nodes each rank
    first does it with its peers of the other nodes, for its own part, and then the node by itself.
    """
    inside = min(ranks, accelerator.per_node)
    nodes = ranks // inside
    link, network = accelerator.link, accelerator.network
    within = (inside - 1) * (link.latency + message / inside / link.bandwidth)
    return within + (nodes - 1) * (network.latency + message / ranks / network.bandwidth)


def all_reduce(message: float, ranks: int, accelerator: Accelerator) -> float:
    """Seconds of an all-reduce of `message` bytes: a reduce-scatter and an all-gather, 2 (N - 1) hops of S / N bytes.

    Between nodes it is that ring or two binary trees, 2 log2(nodes) hops and 2 S bytes (Sanders et al. 2009), whichever
    takes less, as NCCL chooses (Jeaugey 2019, "Massively scale your deep learning training with NCCL 2.4").
    """
    inside = min(ranks, accelerator.per_node)
    nodes, network = ranks // inside, accelerator.network
    within = 2 * gather(message, inside, accelerator)
    part = message / inside
    ring = 2 * (nodes - 1) * (network.latency + part / nodes / network.bandwidth)
    trees = 2 * math.ceil(math.log2(nodes)) * network.latency + 2 * part / network.bandwidth
    return within + min(ring, trees)


def _buckets(message: float, ranks: int, accelerator: Accelerator) -> float:
    """Seconds of all-reducing so many bytes of gradients, a BUCKET at a time."""
    full, rest = divmod(message, BUCKET)
    last = all_reduce(rest, ranks, accelerator) if rest else 0.0
    return full * all_reduce(BUCKET, ranks, accelerator) + last


# ---- speed


@dataclass(frozen=True)
class Speed:
    """Of one accelerator by itself, in seconds."""

    token: float  # forward and backward pass
    update: float  # AdamW, all parameters


def speed_of(config: TrainConfig, rate: float, accelerator: Accelerator) -> Speed:
    """What `rate` tokens a second, over whole steps of `config`, is made of. The update is counted from the memory
    bandwidth, a peak; at most half of a step is it, since very small models wait for other things.
    """
    step = config.tokens_per_step / rate
    update = UPDATE_BYTES * sum(parameters(config.model).values()) / accelerator.memory_bandwidth
    update = min(update, step / 2)
    return Speed((step - update) / config.tokens_per_step, update)


def assumed_rate(config: TrainConfig, accelerator: Accelerator, share: float = MFU) -> float:
    """Tokens a second of one accelerator at a share of its peak."""
    return share * accelerator.peak / flops_per_token(config.model)


@dataclass(frozen=True)
class Prediction:
    """A step of a run on so many ranks; seconds, unless said otherwise."""

    ranks: int
    tokens: int  # in a step, of all ranks
    step: float
    computing: float  # forward and backward, of a rank
    update: float  # AdamW, of a rank
    messages: float  # all of them
    waiting: float  # for the messages that nothing hides
    efficiency: float  # against N accelerators that share the work of a step evenly and send nothing

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step


def predicted(
    config: TrainConfig, ranks: int, parallel: Parallel, accelerator: Accelerator, speed: Speed, size: int = 2
) -> Prediction:
    """A step of `config` on `ranks` accelerators of that speed; `size` is the bytes of a number in the products.

    ddp: gradients, 4 bytes a parameter, are all-reduced once a step; beside the backward pass of the last micro-batch,
    except those of the embeddings, which are complete only when it ends. Every rank updates everything. fsdp: each
    micro-batch gathers every group twice, in the precision of the products, and the last scatters the gradients in
    float32; they travel beside the pass that needs them, except the root's. A rank updates what it holds.
    Raises UserError where the step cannot be split so.
    """
    check(config, ranks, accelerator)
    share, micro = config.share(ranks)
    computing = share * config.model.block_size * speed.token
    forward, backward = (accelerator.overlap * computing / micro * part / 3 for part in (1, 2))
    update = speed.update / (ranks if parallel == "fsdp" else 1)
    if ranks == 1:
        messages = waiting = 0.0
    elif parallel == "ddp":
        counted = parameters(config.model)
        late = counted["embedding"] + counted["positions"]  # looked up first, so last on the way back
        early = _buckets(4 * (sum(counted.values()) - late), ranks, accelerator)
        end = _buckets(4 * late, ranks, accelerator)
        messages, waiting = early + end, max(0.0, early - backward) + end
    else:
        sizes, layers = groups(config), config.model.n_layer
        blocks = [sizes["attention"], sizes["feed-forward"]]
        gathering = layers * sum(gather(size * count, ranks, accelerator) for count in blocks)
        scattering = layers * sum(gather(4 * count, ranks, accelerator) for count in blocks)
        root = gather(4 * sizes["root"], ranks, accelerator)
        messages = micro * (2 * gathering + root) + scattering + root
        late_forward, late_backward = max(0.0, gathering - forward), max(0.0, gathering - backward)
        late_last = max(0.0, gathering + scattering - backward)
        waiting = micro * (late_forward + late_backward + root) - late_backward + late_last + root
    step = computing + update + waiting
    alone = (ranks * computing + speed.update) / ranks
    tokens = config.tokens_per_step
    return Prediction(ranks, tokens, step, computing, update, messages, waiting, min(1.0, alone / step))


def predict(
    config: TrainConfig,
    nproc: int,
    rate_of_one: float,
    bandwidth: float,
    latency: float,
    parallel: Parallel = "ddp",
    overlap: float = 0.0,
    size: int = 4,
    update: float = 0.0,
) -> Prediction:
    """`predicted` from measurements: tokens a second of one process as it is when the others run too (on a CPU: with
    its share of the threads), bytes a second and seconds a hop of what connects them, all in one node, and of that
    process the seconds of the optimizer's update; left at 0 it counts as something that is shared, as the rest is.
    """
    link = Link(bandwidth, latency)
    here = Accelerator("measured", 0.0, 0.0, math.inf, link, link, "measured", per_node=nproc, overlap=overlap)
    speed = Speed(1 / rate_of_one - update / config.tokens_per_step, update)
    return predicted(config, nproc, parallel, here, speed, size)


# ---- a run, and many sizes of it


def run_time(config: TrainConfig, found: Prediction, speed: Speed, validated: float) -> dict[str, float]:
    """Seconds by part of the tokens of `config`, at the pace of a step of it or of `weak`. Evaluations, forward passes
    over `validated` tokens each, are split over the ranks; samples, saving and starting are not counted.
    """
    every = evaluations(config) * validated * speed.token / 3 / found.ranks
    return {"steps": config.max_steps * config.tokens_per_step / found.tokens_per_second, "evaluation": every}


def cost(seconds: float, ranks: int, price: float) -> float:
    """Of so many accelerators for so long, at a price of one for an hour."""
    return seconds / 3600 * ranks * price


def weak(config: TrainConfig, ranks: int) -> TrainConfig:
    """With a micro-batch for each rank in a step."""
    return from_settings({"gradient_accumulation_steps": ranks}, config)


def simulated(
    config: TrainConfig, parallel: Parallel, accelerator: Accelerator, speed: Speed, growing: bool, size: int = 2
) -> list[Prediction]:
    """The COUNTS that the run can be split over: strong scaling, the step as it is, or (growing) weak scaling, a
    micro-batch for each accelerator."""
    runs = [(count, weak(config, count) if growing else config) for count in COUNTS]
    return [
        predicted(run, count, parallel, accelerator, speed, size)
        for count, run in runs
        if refusal(run, count, accelerator) is None
    ]


def assumptions(accelerator: Accelerator, parallel: Parallel) -> list[str]:
    """What the predictions rest on, in sentences."""
    node, link, network = accelerator.per_node, accelerator.link, accelerator.network
    inside = f"{node} a node, {wire(link)} inside" if node > 1 else "one a node"
    rings = {
        "ddp": "ring all-reduce, between nodes by trees where faster",
        "fsdp": "ring all-gather and reduce-scatter",
    }
    hidden = {
        "ddp": "beside the last backward pass, except the gradients of the embeddings",
        "fsdp": "beside the pass that needs it, except the root (embeddings, norms, head)",
    }
    when = hidden[parallel] if accelerator.overlap else "never beside the computing, since the same cores do both"
    return [
        f"{inside}; {wire(network)} between nodes ({accelerator.node}); links of a data sheet are peaks",
        f"{rings[parallel]}; {when}",
        "a rank is as fast a token at its share of the step as one accelerator at all of it; small shares are slower",
        "no rank waits for a slower one, no link is shared with other jobs, reading tokens costs nothing",
        f"{1 - ROOM:.0%} of the memory is left to drivers, NCCL's buffers and holes",
    ]


def wire(link: Link) -> str:
    """'450 GB/s and 3.4 us a hop'."""
    return f"{link.bandwidth / GB:g} GB/s and {link.latency * 1e6:g} us a hop"


def with_links(
    accelerator: Accelerator,
    bandwidth: float | None = None,
    network_bandwidth: float | None = None,
    per_node: int | None = None,
) -> Accelerator:
    """The accelerator with a person's own figures where given: GB/s of a rank, one way, and ranks of a node."""
    if bandwidth is not None:
        accelerator = dataclasses.replace(accelerator, link=Link(bandwidth * GB, accelerator.link.latency))
    if network_bandwidth is not None:
        wire = Link(network_bandwidth * GB, accelerator.network.latency)
        accelerator = dataclasses.replace(accelerator, network=wire, node="given")
    return accelerator if per_node is None else dataclasses.replace(accelerator, per_node=per_node)
