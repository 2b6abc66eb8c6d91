"""Seconds of the collectives of a training step: all-gather, reduce-scatter and all-reduce, with ddp and with fsdp.

S: bytes of a message; N: ranks.
"""

import math

from llm.config import TrainConfig
from llm.config.counts import count_parameters_by_part, matrix_shapes
from llm.plan.accelerators import Accelerator
from llm.plan.arithmetic import count_group_parameters

BUCKET = 25 * 2**20  # bytes of gradients that DistributedDataParallel all-reduces together


def all_gather_seconds(message: float, ranks: int, accelerator: Accelerator) -> float:
    """Return the seconds of an all-gather, or of a reduce-scatter, of `message` bytes over all ranks.

    A ring takes N - 1 hops of S / N bytes, (N - 1) (latency + S / N / bandwidth) (Thakur et al. 2005; Patarasuk & Yuan
    2009). With several nodes, each rank first gathers its own part from its peers in the other nodes; then each node
    gathers by itself.
    """
    ranks_in_node = min(ranks, accelerator.per_node)
    nodes = ranks // ranks_in_node
    link = accelerator.link
    network = accelerator.network
    within_node = (ranks_in_node - 1) * (link.latency + message / ranks_in_node / link.bandwidth)
    return within_node + (nodes - 1) * (network.latency + message / ranks / network.bandwidth)


def all_reduce_seconds(message: float, ranks: int, accelerator: Accelerator) -> float:
    """Return the seconds of an all-reduce of `message` bytes.

    A ring all-reduce is a reduce-scatter and an all-gather: 2 (N - 1) hops of S / N bytes. Between nodes it is that
    ring or two binary trees, 2 log2(nodes) hops and 2 S bytes (Sanders et al. 2009), whichever takes less, as NCCL
    chooses (Jeaugey 2019, "Massively scale your deep learning training with NCCL 2.4").
    """
    ranks_in_node = min(ranks, accelerator.per_node)
    nodes = ranks // ranks_in_node
    network = accelerator.network
    within_node = 2 * all_gather_seconds(message, ranks_in_node, accelerator)
    part = message / ranks_in_node
    ring = 2 * (nodes - 1) * (network.latency + part / nodes / network.bandwidth)
    trees = 2 * math.ceil(math.log2(nodes)) * network.latency + 2 * part / network.bandwidth
    return within_node + min(ring, trees)


def bucketed_all_reduce_seconds(message: float, ranks: int, accelerator: Accelerator) -> float:
    """Return the seconds of all-reducing `message` bytes of gradients, one BUCKET at a time."""
    full_buckets, rest = divmod(message, BUCKET)
    last = all_reduce_seconds(rest, ranks, accelerator) if rest else 0.0
    return full_buckets * all_reduce_seconds(BUCKET, ranks, accelerator) + last


def ddp_messages(config: TrainConfig, ranks: int, accelerator: Accelerator, backward: float) -> tuple[float, float]:
    """Return (seconds of all messages, seconds that a rank waits for them).

    Gradients, 4 bytes per parameter, are all-reduced once per step. They overlap with `backward`, the backward pass of
    the last micro-batch, except those of the embeddings: embeddings are looked up first, so their gradients are
    complete only when the backward pass ends.
    """
    parts = count_parameters_by_part(config.model)
    embeddings = parts["embedding"] + parts["positions"]
    early = bucketed_all_reduce_seconds(4 * (sum(parts.values()) - embeddings), ranks, accelerator)
    late = bucketed_all_reduce_seconds(4 * embeddings, ranks, accelerator)
    return early + late, max(0.0, early - backward) + late


def fsdp_messages(
    config: TrainConfig, ranks: int, accelerator: Accelerator, itemsize: int, forward: float, backward: float
) -> tuple[float, float]:
    """Return (seconds of all messages, seconds that a rank waits for them).

    Each micro-batch gathers every group twice, in the precision of the matrix products, and the last one
    reduce-scatters the gradients in float32. These messages overlap with the pass that needs them, `forward` or
    `backward` of a micro-batch, except those of the root. Muon gathers each of its parameters once more, for the
    update.
    """
    _, micro_batches = config.share(ranks)
    groups = count_group_parameters(config.model)
    block = [groups["attention"], groups["feed-forward"]]
    n_layer = config.model.n_layer
    gather = n_layer * sum(all_gather_seconds(itemsize * count, ranks, accelerator) for count in block)
    scatter = n_layer * sum(all_gather_seconds(4 * count, ranks, accelerator) for count in block)
    root = all_gather_seconds(4 * groups["root"], ranks, accelerator)
    messages = micro_batches * (2 * gather + root) + scatter + root
    late_forward = max(0.0, gather - forward)
    late_backward = max(0.0, gather - backward)
    late_last_backward = max(0.0, gather + scatter - backward)
    waiting = micro_batches * (late_forward + late_backward + root) - late_backward + late_last_backward + root
    muon = _muon_gather_seconds(config, ranks, accelerator, itemsize) if config.optimizer == "muon" else 0.0
    return messages + muon, waiting + muon


def _muon_gather_seconds(config: TrainConfig, ranks: int, accelerator: Accelerator, itemsize: int) -> float:
    """Return the seconds of gathering the updates of the blocks' matrices, one parameter after the other."""
    sizes = [rows * columns for rows, columns in matrix_shapes(config.model)]
    stacked = [sum(sizes[:3]), sizes[3], sum(sizes[4:-1]), sizes[-1]]  # queries, keys and values; gate and up
    return config.model.n_layer * sum(all_gather_seconds(itemsize * size, ranks, accelerator) for size in stacked)
