"""Memory, disk and FLOPs of a run, computed from its settings. docs/plan.md has the sources.

n: tokens of a micro-batch.
"""

import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from llm.config import GPTConfig, TrainConfig
from llm.config.counts import (
    count_attention_parameters,
    count_feed_forward_parameters,
    count_hidden_matrices,
    count_parameters,
    count_parameters_by_part,
    flops_per_token,
    matrix_shapes,
)
from llm.evaluate import WINDOW_TOKENS
from llm.loss import chunk_rows
from llm.machine import fused_gpt2, fused_llama
from llm.machine.device import choose_device, choose_dtype
from llm.machine.fused_block import LONGEST, can_compile
from llm.model import SHORT
from llm.muon import BATCH
from llm.start.predict import LOGIT_BYTES
from llm.training.predictions import KEPT, size_of

MIB = 2**20

TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022: compute-optimal for text that is read once

# Python, PyTorch, Matplotlib, the tokenizer and their scratch space; and the code that PyTorch compiles for products in
# bfloat16 on a CPU. Measured on a model of 2,000 parameters, see docs/plan.md
PROCESS_BYTES = 365 * MIB
BFLOAT16_BYTES = 20 * MIB

# What the choice of a run leaves in the process that trains: the code for the products of each shape that was measured
# besides the chosen one, and what training a BPE keeps for its threads. Measured, see docs/plan.md
MEASURED_SHAPE_BYTES = 18 * MIB
TRAINED_BPE_BYTES = 20 * MIB

# Share of a step's own tensors that lies in gaps between smaller ones, where no tensor of the next step fits. Autograd
# keeps many tensors of many sizes, a fused block few of the same sizes. Measured, see docs/plan.md
FRAGMENTATION = 0.2
FRAGMENTATION_OF_FUSED = 0.05

OF_A_STEP = (
    "low-precision copies",
    "loss",
    "activations",
    "gathered root",
    "gathered groups",
    "accumulated gradients",
)  # freed before the update


def count_group_parameters(model: GPTConfig) -> dict[str, int]:
    """Return the parameters of each group that fully_shard gathers at once.

    A group is the attention of a block, its feed-forward layer, or the root: all the rest (embeddings, norms, head).
    """
    attention = count_attention_parameters(model)
    feed_forward = count_feed_forward_parameters(model)
    root = count_parameters(model) - model.n_layer * (attention + feed_forward)
    return {"attention": attention, "feed-forward": feed_forward, "root": root}


def run_flops(config: TrainConfig) -> float:
    """Return the FLOPs of all steps of a run. Its evaluations, and what its teachers predict, are not counted."""
    return flops_per_token(config.model) * config.tokens_per_step * config.max_steps


def memory(config: TrainConfig, teachers: Sequence[GPTConfig] = ()) -> dict[str, int]:
    """Return the bytes at peak by part: of the process on a CPU, otherwise of the GPU's memory.

    `teachers`: the shapes of the models that the run learns from. Raises UserError if this machine does not have the
    device.
    """
    device = choose_device(config.device)
    itemsize = choose_dtype(config.dtype, device).itemsize
    return memory_for(config, device.type == "cpu", itemsize, teachers)


def memory_for(config: TrainConfig, on_cpu: bool, itemsize: int, teachers: Sequence[GPTConfig] = ()) -> dict[str, int]:
    """Return what `memory` does, for any machine. `itemsize`: bytes of a number in the matrix products."""
    model = config.model
    count = count_parameters(model)
    found = {
        "weights": 4 * count,
        "gradients": 4 * count,
        "optimizer state": optimizer_bytes(config),
        "low-precision copies": _low_precision_bytes(model, on_cpu, itemsize),
        "loss": _loss_bytes(config, on_cpu, itemsize),
        "activations": _activation_bytes(config, on_cpu, itemsize),
    }
    if config.ema:
        found["average of the weights"] = 4 * count
    if teachers:
        found["teachers"] = teacher_excess(found, config, teachers, on_cpu, itemsize)
    if config.optimizer == "muon":
        found["Muon's update"] = muon_excess(found, config, on_cpu, itemsize)
    if on_cpu:
        found["copies being saved"] = bytes_copied_to_save(config)
        found["process"] = PROCESS_BYTES + (BFLOAT16_BYTES if itemsize == 2 else 0)
        share = FRAGMENTATION_OF_FUSED if _is_fused(config, on_cpu, itemsize) else FRAGMENTATION
        found["fragmentation"] = round(share * sum(found[part] for part in ("gradients", "loss", "activations")))
    return found


def teacher_excess(
    held: dict[str, int], config: TrainConfig, teachers: Sequence[GPTConfig], on_cpu: bool, itemsize: int
) -> int:
    """Return the bytes of teachers beyond what the first step takes after they are gone, which is in `held`.

    They have weights, the states of some windows, and one block or the logits. They keep no activations.
    """
    n = max(WINDOW_TOKENS, config.model.block_size)
    weights = sum(4 * count_parameters(shape) + _low_precision_bytes(shape, on_cpu, itemsize) for shape in teachers)
    block = max(n * (8 * shape.n_embd + itemsize * 4 * (shape.n_embd + shape.ffn_width)) for shape in teachers)
    rows = min(n, chunk_rows(n, config.model.vocab_size, LOGIT_BYTES, on_cpu))
    heads = itemsize * sum(shape.vocab_size * shape.n_embd for shape in teachers)
    states = n * itemsize * sum(shape.n_embd for shape in teachers)
    taken = weights + heads + states + max(block, LOGIT_BYTES * rows * config.model.vocab_size)
    return max(0, taken - sum(held.get(part, 0) for part in ("gradients", *OF_A_STEP)))


def muon_excess(held: dict[str, int], config: TrainConfig, on_cpu: bool, itemsize: int) -> int:
    """Return the bytes that Muon's update takes beyond what a step has freed before it, which is in `held`.

    Of each batch of matrices it holds the updates, the orthogonal matrices and, of the largest group of one shape, a
    copy in one piece, the iteration before and after, and two Gram matrices. On a GPU they are in bfloat16.
    """
    groups: dict[tuple[int, ...], int] = {}
    for shape in matrix_shapes(config.model):
        sides = tuple(sorted(shape))
        groups[sides] = groups.get(sides, 0) + config.model.n_layer * math.prod(shape)
    (rows, columns), largest = max(groups.items(), key=lambda group: group[1])
    updates = min(sum(groups.values()), BATCH)
    numbers = 2 * updates + 2 * min(largest, BATCH) * (1 + rows / columns)
    update = (itemsize if on_cpu else 2) * numbers
    return max(0, round(update) - sum(held.get(part, 0) for part in OF_A_STEP))


def optimizer_bytes(config: TrainConfig) -> int:
    """Return the bytes of the optimizer's state: two moments of each parameter, or one of those that Muon updates."""
    moments = 2 * count_parameters(config.model)
    if config.optimizer == "muon":
        moments -= count_hidden_matrices(config.model)
    return 4 * moments


def checkpoint_bytes(config: TrainConfig) -> int:
    """Return the bytes of a checkpoint: weights, the optimizer's state and, with `ema`, an average of the weights."""
    copies_of_weights = 2 if config.ema else 1
    return copies_of_weights * 4 * count_parameters(config.model) + optimizer_bytes(config)


def bytes_copied_to_save(config: TrainConfig) -> int:
    """Return the bytes of the copies while a checkpoint is saved: its own, and the weights again for model.pt."""
    return checkpoint_bytes(config) + 4 * count_parameters(config.model)


def _low_precision_bytes(model: GPTConfig, on_cpu: bool, itemsize: int) -> int:
    """Casts of the weights for the matrix products. On a CPU, the loss casts the head in chunks."""
    if itemsize == 4:
        return 0
    head = 0 if on_cpu else model.vocab_size * model.n_embd
    return itemsize * (count_parameters_by_part(model)["blocks"] + head)


def _loss_bytes(config: TrainConfig, on_cpu: bool, itemsize: int) -> int:
    model = config.model
    n = config.batch_size * model.block_size
    rows = min(n, chunk_rows(n, model.vocab_size, itemsize, on_cpu))
    exponentials = rows * model.vocab_size * itemsize
    embedding_gradient = 4 * model.vocab_size * model.n_embd
    # The exponentials are freed before the embedding's gradient is allocated, so the larger of the two counts. Untied,
    # "gradients" already has that gradient; tied, it is a temporary that is added to the head's.
    peak = max(exponentials, embedding_gradient)
    if not model.tied_lm_head:
        peak -= embedding_gradient
    hidden_gradient_and_sums = 8 * n * model.n_embd
    predictions = 16 * n * min(KEPT, model.vocab_size) if config.teacher else 0  # as read, and as the loss takes them
    return peak + hidden_gradient_and_sums + predictions


def _activation_bytes(config: TrainConfig, on_cpu: bool, itemsize: int) -> int:
    """What autograd keeps of all blocks for the backward pass, and the gradients of about one block.

    With activation_checkpointing it keeps the float32 residual stream into each block, and all of one block.
    """
    model = config.model
    n = config.batch_size * model.block_size
    gradients = 4 * n * ((4 if model.arch == "llama" else 2) * model.ffn_width + 8 * model.n_embd)  # approximate
    block = n * _block_bytes(config, on_cpu, itemsize)
    kept = model.n_layer * block
    if config.activation_checkpointing:
        kept = min(kept, block + model.n_layer * n * 4 * model.n_embd)
    return kept + gradients


def _block_bytes(config: TrainConfig, on_cpu: bool, itemsize: int) -> int:
    """What autograd keeps of a block for each token."""
    model = config.model
    if _is_fused(config, on_cpu, itemsize):
        return _fused_block_bytes(model)
    has_dropout = model.dropout > 0
    is_slow_fused = on_cpu and itemsize != 4 and 1 < model.block_size <= SHORT
    by_plain_operations = has_dropout or is_slow_fused
    if model.arch == "llama":
        block = _llama_block_bytes(model, itemsize, by_plain_operations)
    else:
        # float32: the residual stream before attention and before the feed-forward layer. In the precision of the
        # products: two normed copies, queries, keys, values, the output of attention, and the feed-forward layer before
        # and after its GELU.
        block = model.n_embd * (8 + itemsize * (2 * model.ffn_mult + 6))
    if has_dropout:  # the weights of attention (T, T), their mask and their product
        softmax = itemsize if on_cpu else 4  # a GPU's autocast makes softmax in float32
        block += (2 * softmax + itemsize) * model.block_size * model.n_head
        block += 2 * model.n_embd * itemsize
    elif is_slow_fused:
        block += itemsize * model.block_size * model.n_head
    return block


def _is_fused(config: TrainConfig, on_cpu: bool, itemsize: int) -> bool:
    """Whether the blocks are computed by llm.machine.fused_gpt2 or llm.machine.fused_llama."""
    file = fused_llama.FILE if config.model.arch == "llama" else fused_gpt2.FILE
    fits = config.parallel == "ddp" and config.model.block_size <= LONGEST
    return fits and on_cpu and itemsize == 2 and can_compile(file)


def _fused_block_bytes(model: GPTConfig) -> int:
    """What a fused block keeps for each token; the names are those of its tensors."""
    joined = (model.n_head + 2 * model.kv_heads) * model.head_size
    x_and_middle = 2 * 4 * model.n_embd
    y_1_y_2_and_merged = 2 * (2 * model.n_embd + model.n_head * model.head_size)
    attention = 2 * model.n_head * model.block_size
    both = x_and_middle + y_1_y_2_and_merged + attention
    if model.arch == "llama":
        joined_and_heads = 2 * 2 * joined
        gates = 2 * 2 * model.ffn_width
        scales = 4 * (2 + model.n_head + model.kv_heads)
        return both + joined_and_heads + gates + scales
    heads = 2 * joined
    slopes_and_hidden = 2 * 2 * model.ffn_width
    scales = 4 * 2 * 2
    return both + heads + slopes_and_hidden + scales


def _llama_block_bytes(model: GPTConfig, itemsize: int, by_plain_operations: bool) -> int:
    """What autograd keeps of a block of `llm.llama` for each token, without the weights of attention."""
    width, queries, keys = model.n_embd, model.n_head * model.head_size, model.kv_heads * model.head_size
    stream_and_normed = 4 * 4 * width  # before attention and before the feed-forward layer, in float32
    scaled_rotated_and_merged = itemsize * (2 * width + 3 * queries)  # the inputs of three products; queries and keys
    feed_forward = 4 * itemsize * model.ffn_width  # gate and up, the activated gate, the product
    found = stream_and_normed + scaled_rotated_and_merged + feed_forward
    if itemsize == 4 or not by_plain_operations:
        found += itemsize * (queries + 2 * keys)  # queries, keys and values as they were joined
    if by_plain_operations or keys < queries:
        found += itemsize * queries  # values, copied
    if model.qk_norm:  # the normed vectors in float32, and in bfloat16 a copy of them before
        found += (4 if itemsize == 4 else 8) * (queries + keys)
    return found


def machine_memory() -> int | None:
    """Return the bytes of memory of this machine, or of its container; None if the system does not report it."""
    try:
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
    try:
        return min(found, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return found


def peak_memory() -> int | None:
    """Return the peak resident bytes of this process; None if the system does not report it."""
    try:
        if sys.platform == "linux":  # its getrusage includes the peak of the parent before exec
            status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
            return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    except (ImportError, OSError, IndexError):
        return None


def disk(config: TrainConfig, tokens: int) -> dict[str, int]:
    """Return the bytes of a finished run by part. `tokens`: tokens of the training split."""
    count = count_parameters(config.model)
    kept = min(config.keep + 1, 1 + count_evaluations(config))  # the newest checkpoints and the best
    bytes_per_token = 4 if config.model.vocab_size > 2**16 else 2
    found = {
        "checkpoints": kept * checkpoint_bytes(config),
        "model.pt and best.pt": 2 * 4 * count,
        "token files": round(bytes_per_token * tokens / (1 - config.val_fraction)),
    }
    if config.teacher:
        found["what the teachers predict"] = size_of(config, tokens)
    return found


def count_evaluations(config: TrainConfig) -> int:
    """Return the number of evaluations of a run, the first and the last included."""
    return 1 + math.ceil(config.max_steps / config.eval_every)


def count_validations(config: TrainConfig) -> int:
    """Return how often a run goes through the validation text: with `ema` twice at each evaluation."""
    return count_evaluations(config) * (2 if config.ema else 1)


def optimal_parameters(flops: float) -> float:
    """Return the compute-optimal parameters for `flops` (Hoffmann et al. 2022): flops = 6 N D with D = 20 N tokens."""
    return math.sqrt(flops / (6 * TOKENS_PER_PARAMETER))
