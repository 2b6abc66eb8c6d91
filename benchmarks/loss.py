"""Compare the loss curves of our loop and of a plain float32 loop, from the same weights on the same batches.

Both train the chapter's recipe on prepared token files. The plain loop computes all logits at once, uses PyTorch's
cross-entropy and its default AdamW, and is evaluated in float32 over the same windows.

    python -m benchmarks.loss --data_dir data [--seeds 1,2,3] [--steps 250] [--preset chapter]
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.step import settings_of
from llm import GPT
from llm.config import from_settings, to_settings
from llm.data import TokenData, batch_at, open_data
from llm.evaluate import evaluate
from llm.machine.device import choose_device, choose_dtype, precision
from llm.schedule import lr_at
from llm.start.build import build
from llm.train import train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--steps", default="250", help="steps to compare at, such as 1000,1750")
    parser.add_argument("--preset", default="chapter")
    args = parser.parse_args()
    steps = [int(word) for word in args.steps.split(",")]
    for seed in map(int, args.seeds.split(",")):
        config = from_settings(to_settings(settings_of(args.preset)) | {"seed": seed})
        data = open_data(args.data_dir, config.model.block_size, config.model.vocab_size)
        our_losses = ours(config, data, steps)
        plain_losses = plain(config, data, steps)
        for step, a, b in zip(steps, our_losses, plain_losses, strict=True):
            print(f"seed {seed} step {step}: ours {a:.4f}, plain {b:.4f}, difference {a - b:+.4f}", flush=True)


def ours(config: Any, data: TokenData, steps: list[int]) -> list[float]:
    """Train our loop; return the validation loss after each of `steps`, in nats per token."""
    device = choose_device("cpu")
    parts = build(config, data, None, device, choose_dtype(config.dtype, device))
    parts.model.train()
    found = []
    for step in range(max(steps)):
        train_step(parts, step)
        if step + 1 in steps:
            with precision(parts.dtype, device):
                found.append(evaluate(parts.model, data.val, config.model.block_size, config.eval_tokens).loss)
    return found


def plain(config: Any, data: TokenData, steps: list[int]) -> list[float]:
    """Train the chapter's loop; return the validation loss after each of `steps`, in nats per token."""
    torch.manual_seed(config.seed)
    model = GPT(config.model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.max_lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
    )
    found = []
    for step in range(max(steps)):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, config)
        batch = batch_at(data.train, config.seed, step, config.batch_size, config.model.block_size)
        logits, _ = model(torch.from_numpy(batch.x))
        loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.y).flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step + 1 in steps:
            found.append(evaluate(model, data.val, config.model.block_size, config.eval_tokens).loss)
    return found


if __name__ == "__main__":
    main()
