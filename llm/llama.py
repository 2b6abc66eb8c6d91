"""Llama: the shape of model that the field trains and runs today. One device; it knows nothing of training.

What differs from the chapter's `model.GPT`: RMSNorm (Zhang & Sennrich 2019) in place of LayerNorm, positions by
rotation of queries and keys (RoPE, Su et al. 2021) in place of learned ones, SwiGLU (Shazeer 2020) in place of GELU, no
biases, and if asked fewer heads of keys and values than of queries (GQA, Ainslie et al. 2023). This is Llama's
architecture (Touvron et al. 2023); with a norm of queries and keys (Henry et al. 2020) it is Qwen3's (2025).

Shapes: B batch, T time (tokens), C channels (n_embd), V vocabulary, H heads, K heads of keys and values, D channels of
a head (C / H, or head_dim), F width of the feed-forward layer.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from llm.config import GPTConfig
from llm.errors import UserError
from llm.loss import Taught, linear_cross_entropy
from llm.machine import fused_block, fused_llama
from llm.model import Dropout, KVCache, attend


class RMSNorm(nn.Module):
    """Scale vectors to a root mean square of 1, then each channel by its weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), self.weight.to(x.dtype), self.eps)


class Rotation:
    """RoPE for the positions `first` to `first + T - 1`: channel i of a head turns with channel i + D/2.

    The angle of pair i at position p is p / theta^(2i / D). A query times a key then depends on their distance only.
    """

    def __init__(self, first: int, T: int, D: int, theta: float, device: torch.device) -> None:
        frequencies = theta ** (-torch.arange(0, D, 2, device=device, dtype=torch.float32) / D)  # (D / 2,)
        angles = torch.outer(torch.arange(first, first + T, device=device, dtype=torch.float32), frequencies)
        self.cos = angles.cos()[:, None]  # (T, 1, D / 2): the same for all heads
        self.sin = angles.sin()[:, None]

    def __call__(self, x: Tensor) -> Tensor:
        """Return x (B, T, heads, D), rotated."""
        a, b = x.chunk(2, -1)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class QKNorm(nn.Module):
    """A norm of each query and of each key, over the channels of its head."""

    def __init__(self, D: int, eps: float) -> None:
        super().__init__()
        self.q, self.k = RMSNorm(D, eps), RMSNorm(D, eps)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.q(q), self.k(k)


class Attention(nn.Module):
    """Causal self-attention. The linears of queries, keys and values are one product."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head, self.head_size = config.n_head, config.kv_heads, config.head_size
        self.c_attn = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_size, bias=False)
        self.c_proj = nn.Linear(self.n_head * self.head_size, config.n_embd, bias=False)

    def forward(
        self, x: Tensor, norm: QKNorm | None, rotate: Rotation, cache: KVCache | None, drop: Dropout | None
    ) -> Tensor:
        B, T, _ = x.shape
        qkv = self.c_attn(x).view(B, T, -1, self.head_size)
        q, k, v = qkv.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=2)
        if norm is not None:
            q, k = norm(q, k)
        q, k, v = (y.transpose(1, 2) for y in (rotate(q), rotate(k), v))  # (B, heads, T, D)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        if self.n_kv_head < self.n_head:  # query head i reads key head i // (H / K)
            k, v = (y.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for y in (k, v))
        return self.c_proj(attend(q, k, v, drop).transpose(1, 2).reshape(B, T, -1))  # type: ignore[no-any-return]


class SwiGLU(nn.Module):
    """The feed-forward layer. The linears of gate and up are one product."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 2 * config.ffn_width, bias=False)
        self.c_proj = nn.Linear(config.ffn_width, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.c_fc(x).chunk(2, -1)
        return self.c_proj(F.silu(gate) * up)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention, then the feed-forward layer, each on a normed copy and added to the stream.

    The norm of queries and keys stands here and not in the attention: FSDP gathers the attention in the precision of
    its products, and a norm in float32.
    """

    # Whether one function may compute the block in bfloat16 on a CPU. Set it to False if you change the block: that
    # function would not know. parallel.shard_model does so too: shards are gathered where attention and mlp are called.
    may_fuse = True

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.qk_norm = QKNorm(config.head_size, config.norm_eps) if config.qk_norm else None
        self.attn = Attention(config, layer)
        self.ln_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, cache: KVCache | None, drop: Dropout | None, rotate: Rotation) -> Tensor:
        if cache is None and self.may_fuse and fused_block.is_possible(x, fused_llama.FILE):
            return self._fused(x, drop, rotate)
        keep = drop or (lambda y: y)
        x = x + keep(self.attn(self.ln_1(x), self.qk_norm, rotate, cache, drop))
        return x + keep(self.mlp(self.ln_2(x)))

    def _fused(self, x: Tensor, drop: Dropout | None, rotate: Rotation) -> Tensor:
        attn, mlp, norms = self.attn, self.mlp, self.qk_norm
        sizes = fused_block.Sizes(x.size(0), x.size(1), attn.n_head, attn.n_kv_head, attn.head_size, self.ln_1.eps)
        q_norm, k_norm = (norms.q.weight, norms.k.weight) if norms is not None else (None, None)
        drops = fused_block.Drops(drop.keys(3), drop.threshold, 1 / (1 - drop.p)) if drop is not None else None
        of_attention = (self.ln_1.weight, attn.c_attn.weight, q_norm, k_norm, attn.c_proj.weight)
        of_mlp = (self.ln_2.weight, mlp.c_fc.weight, mlp.c_proj.weight)
        return fused_llama.fused_llama(x, sizes, drops, rotate.cos, rotate.sin, *of_attention, *of_mlp)


class Llama(nn.Module):
    """The model. `model(idx)` is (logits, None); `model(idx, targets)` is (None, loss)."""

    # A key/value cache goes on when the window slides: rotated keys stay valid, because only distances count. The
    # states then differ from those of the last block_size tokens alone, since each kept key and value was computed
    # when older tokens were still in the window.
    cache_slides = True

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied_lm_head:
            self.lm_head.weight = self.wte.weight
        # every block adds nothing to the stream at first, and every token is equally likely
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight") or name == "lm_head.weight":
                nn.init.zeros_(p)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02 if name == "wte.weight" else 1 / math.sqrt(config.n_embd))

    def hidden(self, idx: Tensor, cache: KVCache | None = None, seeds: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, C) of tokens `idx` (B, T), after those in `cache`; the rest as in `stream`."""
        return self.stream(self.wte(idx), cache, seeds)

    def stream(self, x: Tensor, cache: KVCache | None = None, seeds: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, C) out of the embeddings `x` (B, T, C) of tokens after those in `cache`.

        A full cache loses its oldest tokens. `seeds` (B,) int32 decide what dropout draws for each window; without
        them, in training, they are drawn from torch's own generator.
        Raises UserError where T is above block_size.
        """
        T = x.size(1)
        if T > self.config.block_size:  # noqa: SIM300
            raise UserError(f"{T} tokens do not fit block_size = {self.config.block_size}; crop the context")
        first = cache.make_room(T) if cache is not None else 0
        drop = Dropout.of(self, self.config.dropout, x, seeds)
        rotate = Rotation(first, T, self.config.head_size, self.config.rope_theta, x.device)
        if drop is not None:
            x = drop(x)
        for block in self.h:
            x = block(x, cache, drop, rotate)
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
        """(logits (B, T, V), None), or with targets (B, T): (None, mean cross-entropy in nats per token)."""
        x = self.hidden(idx, seeds=seeds)
        if targets is None:
            return self.lm_head(x), None
        return None, linear_cross_entropy(x, self.lm_head.weight, targets, taught)
