"""Parameters, memory, disk and FLOPs of a run, computed from its settings. docs/plan.md has the sources.

n: tokens of a micro-batch.
"""

import math
import os
import re
import sys
from pathlib import Path

from llm.config import GPTConfig, TrainConfig
from llm.loss import chunk_rows
from llm.machine.device import choose_device, choose_dtype
from llm.model import SHORT

MIB = 2**20


COPIES = 16  # bytes a parameter while a state is saved: weights and moments, and the weights once more as model.pt


TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022: compute-optimal for text that is read once


# measured, on the configurations that benchmarks/plan.py calls tuned
PROCESS = 350 * MIB  # Python, PyTorch, Matplotlib, the tokenizer and their scratch space


def parameters(config: GPTConfig) -> dict[str, int]:
    """Parameters by part. A tied head has none of its own."""
    width, wide = config.n_embd, config.ffn_mult * config.n_embd
    attention = 4 * width * width + (4 * width if config.bias else 0)
    feed_forward = 2 * width * wide + wide + width
    return {
        "embedding": config.vocab_size * width,
        "positions": config.block_size * width,
        "blocks": config.n_layer * (attention + feed_forward + 4 * width) + 2 * width,  # the last norm too
        "head": 0 if config.tied_lm_head else config.vocab_size * width,
    }


def flops_per_token(config: GPTConfig) -> float:
    """Of forward and backward: as `GPT.flops_per_token`, without building the model."""
    block = (4 + 2 * config.ffn_mult) * config.n_embd**2
    weights = config.n_layer * block + config.vocab_size * config.n_embd
    return 6.0 * weights + 12.0 * config.n_layer * config.n_embd * config.block_size


def run_flops(config: TrainConfig) -> float:
    """Of all the steps of a run; its evaluations are not counted."""
    return flops_per_token(config.model) * config.tokens_per_step * config.max_steps


def memory(config: TrainConfig) -> dict[str, int]:
    """Bytes at peak by part: of the process on a CPU, else what lies on the card.

    Raises UserError for a device that is not there.
    """
    device = choose_device(config.device)
    return memory_on(device.type == "cpu", choose_dtype(config.dtype, device).itemsize, config)


def memory_on(on_cpu: bool, size: int, config: TrainConfig) -> dict[str, int]:
    """As `memory`, of any machine; `size` is the bytes of a number in the precision of the products."""
    model, low = config.model, size != 4
    count, table = sum(parameters(model).values()), model.vocab_size * model.n_embd
    n = config.batch_size * model.block_size
    rows = min(n, chunk_rows(n, model.vocab_size, size, on_cpu))
    # the embedding's gradient takes the place of the exponentials; tied, the head's joins it, else it is counted below
    loss = max(rows * model.vocab_size * size, 4 * table) - (0 if model.tied_lm_head else 4 * table)
    loss += n * model.n_embd * 8  # and the hidden states' gradient, and sums
    # kept for the backward pass of a block: the stream before each of its halves, in float32; in the precision of the
    # products both normed copies, queries, keys, values, what attention gives, and the feed-forward layer before and
    # after its GELU
    layer = n * model.n_embd * (8 + size * (2 * model.ffn_mult + 6))
    if model.dropout > 0 or (on_cpu and low and 1 < model.block_size <= SHORT):  # attention by plain operations
        layer += (3 if model.dropout > 0 else 1) * n * model.block_size * model.n_head * size
    if model.dropout > 0:
        layer += 2 * n * model.n_embd * size
    passing = n * model.n_embd * 4 * (2 * model.ffn_mult + 8)  # a block's gradients on their way back, about
    found = {
        "weights": 4 * count,
        "gradients": 4 * count,
        "optimizer state": 8 * count,
        "low-precision copies": size * (parameters(model)["blocks"] + (0 if on_cpu else table)) if low else 0,
        "loss": loss,
        "activations": model.n_layer * layer + passing,
    }
    if on_cpu:
        found |= {"copies being saved": COPIES * count, "process": PROCESS}
    return found


def machine_memory() -> int | None:
    """Bytes of memory of this machine, or of the container it is; None where the system does not say."""
    try:
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
    try:
        return min(found, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return found


def peak_memory() -> int | None:
    """Bytes that this process held at most; None where the system does not say."""
    try:
        if sys.platform == "linux":  # whose getrusage counts what a parent held before it became this process
            status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
            return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    except (ImportError, OSError, IndexError):
        return None


def disk(config: TrainConfig, tokens: int) -> dict[str, int]:
    """Bytes of a run when it is done, by part; `tokens` are those of the training split."""
    count = sum(parameters(config.model).values())
    kept = min(config.keep + 1, 1 + evaluations(config))  # the newest and the best
    each = 4 if config.model.vocab_size > 2**16 else 2
    return {
        "states": kept * 12 * count,  # weights and two moments, float32
        "model.pt and best.pt": 2 * 4 * count,
        "token files": round(each * tokens / (1 - config.val_fraction)),
    }


def evaluations(config: TrainConfig) -> int:
    """How often a run evaluates, at its start and its end included."""
    return 1 + math.ceil(config.max_steps / config.eval_every)


def optimal_parameters(flops: float) -> float:
    """The size that is best for so much work, by Hoffmann et al. 2022: flops = 6 N D with D = 20 N tokens."""
    return math.sqrt(flops / (6 * TOKENS_PER_PARAMETER))
