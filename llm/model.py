"""GPT: a decoder-only transformer (Radford et al. 2019), on one device and without any training code.

Shapes: B batch, T time (tokens), C channels (n_embd), V vocabulary, H heads, D = C / H.
Parameter names follow GPT-2's, so that weights map by name.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from llm.config import GPTConfig
from llm.errors import UserError
from llm.loss import Taught, linear_cross_entropy
from llm.machine import fused_block, fused_gpt2

__all__ = ["GPT", "GPTConfig", "KVCache"]

SHORT = 512  # positions up to which plain operations are faster than fused attention in bfloat16 on a CPU


class KVCache:
    """Keys and values of the tokens seen so far, so that a new token costs one position of work."""

    def __init__(self, config: GPTConfig, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.n_layer, 2, batch, config.kv_heads, config.block_size, config.head_size)
        self.kept = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # tokens held; the model's `stream` increases it
        self.dropped = 0  # older tokens that `make_room` removed

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, H, T, D) of new tokens; return those of all tokens so far."""
        end = self.length + k.size(2)
        kept = self.kept[layer]
        kept[0, :, :, self.length : end], kept[1, :, :, self.length : end] = k, v
        return kept[0, :, :, :end], kept[1, :, :, :end]

    def make_room(self, T: int) -> int:
        """Drop the oldest tokens if T more do not fit; return the position of the first of these T."""
        excess = max(0, self.length + T - self.kept.size(4))
        if excess:
            self.length -= excess
            self.dropped += excess
            self.kept[..., : self.length, :] = self.kept[..., excess : excess + self.length, :].clone()
        return self.dropped + self.length


class Dropout:
    """Dropout with a mask that is a hash of (seed of the window, dropout call in the model, position).

    So a window drops the same activations in any micro-batch and in any process, and a resumed run has
    the masks of the uninterrupted one. The hash is a 32-bit integer mixer of the xorshift-multiply kind
    (constants from C. Wellons, "Prospecting for hash functions", 2018).
    """

    def __init__(self, p: float, seeds: Tensor) -> None:
        self.p, self.seeds, self.place = p, seeds, 0

    @staticmethod
    def of(model: nn.Module, p: float, x: Tensor, seeds: Tensor | None) -> "Dropout | None":
        """Return the dropout of a forward pass on windows x (B, ...); None in evaluation mode or if p is 0.

        Without `seeds` (B,) int32, they are drawn from torch's own generator.
        """
        if not model.training or p == 0:
            return None
        if seeds is None:
            seeds = torch.randint(2**31 - 1, (x.size(0),), device=x.device, dtype=torch.int32)
        return Dropout(p, seeds)

    def keys(self, count: int) -> Tensor:
        """Return the windows' keys (count, B) int32 in the next `count` places where the model drops."""
        places = torch.arange(self.place + 1, self.place + 1 + count, device=self.seeds.device, dtype=torch.int32)
        self.place += count
        return _mix(self.seeds + places[:, None] * 0x3C6EF372)

    @property
    def threshold(self) -> int:
        """The hash, a signed 32-bit integer, from which an element is kept."""
        return int((self.p - 0.5) * 2**32)

    def __call__(self, x: Tensor) -> Tensor:
        """Return x (B, ...) with a fraction p of its elements zeroed and the others scaled by 1 / (1 - p)."""
        keys = self.keys(1).view(-1, *[1] * (x.dim() - 1))
        index = _mix(torch.arange(x[0].numel(), device=x.device, dtype=torch.int32)).view(1, *x.shape[1:])
        bits = (keys ^ index).mul_(0x7FEB352D)  # both are mixed, so one more round is enough to combine them
        bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF)).mul_(0x846CA68B - 2**32)
        return x * (bits >= self.threshold).to(x.dtype).mul_(1 / (1 - self.p))


def _mix(x: Tensor) -> Tensor:
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ (x >> 16 & 0xFFFF)


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.n_head = layer, config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, cache: KVCache | None, drop: Dropout | None) -> Tensor:
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in self.c_attn(x).split(C, dim=2))
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        return self.c_proj(attend(q, k, v, drop).transpose(1, 2).reshape(B, T, C))  # type: ignore[no-any-return]


def attend(q: Tensor, k: Tensor, v: Tensor, drop: Dropout | None) -> Tensor:
    """Return causal attention (B, H, T, D) of q, the last T positions, over k and v (B, H, S, D), S >= T.

    PyTorch's fused kernel computes it, with two exceptions: with dropout, because the kernel draws its own masks, and
    for short contexts in bfloat16 on a CPU, where three plain operations are faster (docs/decisions.md).
    """
    T, S, D = q.size(2), k.size(2), q.size(3)
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and 1 < T <= SHORT
    if drop is None and not slow:
        mask = None if T in (1, S) else q.new_ones(T, S, dtype=torch.bool).tril(S - T)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=T == S > 1)
    unseen = q.new_full((T, S), -math.inf).triu(S - T + 1).expand(q.size(0) * q.size(1), T, S)
    scores = torch.baddbmm(unseen, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=1 / math.sqrt(D))
    weights = torch.softmax(scores, 2).view(*q.shape[:2], T, S)
    return (weights if drop is None else drop(weights)).to(v.dtype) @ v


class MLP(nn.Module):
    """The feed-forward layer."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.ffn_mult * config.n_embd)
        self.c_proj = nn.Linear(config.ffn_mult * config.n_embd, config.n_embd)
        self.gelu = nn.GELU(approximate="tanh" if config.gelu == "tanh" else "none")

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm block: attention, then the feed-forward layer, each added to the residual stream."""

    # Whether one function may compute the block in bfloat16 on a CPU. Set it to False if you change the block: that
    # function would not know. parallel.shard_model does so too: shards are gathered where attention and mlp are called.
    may_fuse = True

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None, drop: Dropout | None) -> Tensor:
        if cache is None and self.may_fuse and fused_block.is_possible(x, fused_gpt2.FILE):
            return self._fused(x, drop)
        keep = drop or (lambda y: y)
        x = x + keep(self.attn(self.ln_1(x), cache, drop))
        return x + keep(self.mlp(self.ln_2(x)))

    def _fused(self, x: Tensor, drop: Dropout | None) -> Tensor:
        B, T, C = x.shape
        H = self.attn.n_head
        sizes = fused_block.Sizes(B, T, H, H, C // H, self.ln_1.eps)
        drops = fused_block.Drops(drop.keys(3), drop.threshold, 1 / (1 - drop.p)) if drop is not None else None
        layers = (self.ln_1, self.attn.c_attn, self.attn.c_proj, self.ln_2, self.mlp.c_fc, self.mlp.c_proj)
        weights = (w for layer in layers for w in (layer.weight, layer.bias))
        return fused_gpt2.fused_gpt2(x, sizes, drops, self.mlp.gelu.approximate == "tanh", *weights)


class GPT(nn.Module):
    """The model. `model(idx)` is (logits, None); `model(idx, targets)` is (None, loss)."""

    cache_slides = False  # when the window slides, every token gets another learned position

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied_lm_head:
            self.lm_head.weight = self.wte.weight
        # GPT-2's initialisation: 0.02, and less for the 2 * n_layer projections that add to the residual stream
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                branch = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if branch else 0.02)

    def hidden(self, idx: Tensor, cache: KVCache | None = None, seeds: Tensor | None = None) -> Tensor:
        """Return hidden states (B, T, C) of tokens `idx` (B, T) that follow those in `cache`; see `stream`."""
        return self.stream(self.wte(idx), cache, seeds)

    def stream(self, x: Tensor, cache: KVCache | None = None, seeds: Tensor | None = None) -> Tensor:
        """Return hidden states (B, T, C) from the embeddings `x` (B, T, C) of tokens that follow those in `cache`.

        `seeds` (B,) int32 determine the dropout masks of each window; without them, in training mode,
        torch's global generator draws them.
        Raises UserError if the context would be longer than block_size.
        """
        T, past = x.size(1), cache.length if cache is not None else 0
        if past + T > self.config.block_size:
            raise UserError(f"{past + T} tokens do not fit block_size = {self.config.block_size}; crop the context")
        drop = Dropout.of(self, self.config.dropout, x, seeds)
        x = x + self.wpe.weight[past : past + T]
        if drop is not None:
            x = drop(x)
        for block in self.h:
            x = block(x, cache, drop)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)  # type: ignore[no-any-return]

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        seeds: Tensor | None = None,
        taught: Taught | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return (logits (B, T, V), None), or with targets (B, T): (None, mean cross-entropy in nats per token)."""
        x = self.hidden(idx, seeds=seeds)
        if targets is None:
            return self.lm_head(x), None
        return None, linear_cross_entropy(x, self.lm_head.weight, targets, taught)
