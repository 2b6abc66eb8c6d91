"""The settings: the shape of a model, and everything that determines a training run."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from llm.config.fields import setting, validate
from llm.errors import UserError

PRESETS = ("chapter", "shakespeare-char", "shakespeare-char-cpu", "gpt2-124m")


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape of a model. The defaults are the chapter's: 13.67 M parameters."""

    arch: Literal["gpt2", "llama"] = setting(
        "gpt2", "gpt2: the chapter's model; llama: RMSNorm, RoPE, SwiGLU and a norm of queries and keys"
    )
    vocab_size: int = setting(50257, "tokens in the vocabulary", low=1, high=2**31)
    block_size: int = setting(64, "context length, in tokens", low=1, high=2**20)
    n_layer: int = setting(4, "transformer blocks", low=1, high=1000)
    n_head: int = setting(4, "attention heads; n_embd must be divisible by it", low=1, high=1000)
    n_embd: int = setting(128, "width of the residual stream", low=1, high=2**17)
    ffn_mult: int = setting(4, "width of the feed-forward layer, in units of n_embd", low=1, high=64, arch="gpt2")
    dropout: float = setting(0.0, "fraction of activations that training drops", low=0.0, high=0.99)
    bias: bool = setting(
        False, "give the attention linears a bias (the feed-forward linears and norms have one)", arch="gpt2"
    )
    tied_lm_head: bool = setting(False, "use the token embedding as the output matrix, as GPT-2 does")
    gelu: Literal["exact", "tanh"] = setting("exact", "exact GELU, or GPT-2's tanh approximation", arch="gpt2")
    n_kv_head: int | None = setting(
        None,
        "heads of keys and values; n_head must be divisible by it (default: n_head)",
        low=1,
        high=1000,
        arch="llama",
    )
    ffn_dim: int | None = setting(
        None,
        "width of the feed-forward layer (default: 8/3 of n_embd, rounded up to a multiple of 64)",
        low=1,
        high=2**20,
        arch="llama",
    )
    head_dim: int | None = setting(
        None, "channels of a head (default: n_embd / n_head)", low=2, high=2**12, arch="llama"
    )
    rope_theta: float = setting(1e4, "base of RoPE's wavelengths", low=1.0, high=1e9, arch="llama")
    norm_eps: float = setting(
        1e-6,
        "added to the mean square in the norms: Qwen3's; Llama's models have 1e-5",
        above=0.0,
        high=1.0,
        arch="llama",
    )
    qk_norm: bool = setting(True, "norm queries and keys: Qwen3's shape; without it, Llama's", arch="llama")

    def __post_init__(self) -> None:
        validate(self)
        self._check_arch()
        if self.head_dim is None and self.n_embd % self.n_head:
            raise UserError(
                f"n_embd = {self.n_embd} is not divisible by n_head = {self.n_head}; "
                f"try --n_embd {math.ceil(self.n_embd / self.n_head) * self.n_head}"
            )
        if self.n_head % self.kv_heads:
            raise UserError(
                f"n_head = {self.n_head} is not divisible by n_kv_head = {self.n_kv_head}; "
                f"try --n_kv_head {math.gcd(self.n_head, self.kv_heads)}"
            )
        if self.arch == "llama" and self.head_size % 2:
            if self.head_dim is not None:
                raise UserError(
                    f"head_dim = {self.head_dim}: RoPE turns the channels of a head in pairs; try --head_dim "
                    f"{self.head_dim + 1}"
                )
            raise UserError(
                f"n_embd / n_head = {self.head_size}, and RoPE turns the channels of a head in pairs; "
                f"try --n_embd {(self.head_size + 1) * self.n_head}"
            )

    def _check_arch(self) -> None:
        for f in dataclasses.fields(self):
            value, arch = getattr(self, f.name), f.metadata["arch"]
            if arch not in ("", self.arch) and value != f.default:
                raise UserError(
                    f"{f.name} = {value!r}: applies to arch {arch}, and arch is {self.arch}; "
                    f"leave it out, or give --arch {arch}"
                )

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_kv_head or self.n_head

    @property
    def ffn_width(self) -> int:
        """Width of the feed-forward layer."""
        if self.arch == "gpt2":
            return self.ffn_mult * self.n_embd
        return self.ffn_dim or math.ceil(8 / 3 * self.n_embd / 64) * 64


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that determines a training run. The defaults are the chapter's recipe.

    `model` holds the fields of `GPTConfig`; flags, TOML files and keywords set them by the same names. The model's
    `vocab_size` is the tokenizer's, unless it is given.
    """

    text: tuple[str, ...] = setting(
        (),
        "what to train on: files, folders, - (standard input) or a name: shakespeare, tinystories, fineweb-edu",
    )
    text_limit: int | None = setting(
        None, "characters to take from tinystories or fineweb-edu (default: 200M)", low=1, unit="characters"
    )
    text_field: str | None = setting(None, "field (.jsonl) or column (.parquet) that holds the text (default: text)")
    tokenizer: Literal["auto", "gpt2", "bpe", "byte", "char", "hf"] = setting(
        "auto",
        "auto: gpt2 if its vocabulary can be loaded, else a bpe trained on the text; hf: that of the weights of "
        "init_from, made by another program",
    )
    vocab_size: int | None = setting(
        None, "tokens in the vocabulary (default: the tokenizer's; 4096 for bpe)", low=1, high=2**31
    )
    val_fraction: float = setting(
        0.1, "fraction of the text's characters, taken from its end, held out for validation", above=0.0, high=0.9
    )
    data_dir: str | None = setting(None, "folder of train.bin and val.bin (default: data, or data/NAME for a --text)")
    out_dir: str = setting("checkpoints", "the run folder")

    model: GPTConfig = field(default_factory=GPTConfig)

    batch_size: int = setting(32, "windows per micro-batch", low=1, high=2**20)
    gradient_accumulation_steps: int = setting(1, "micro-batches per step", low=1, high=2**20)
    order: Literal["replacement", "epochs"] = setting(
        "replacement", "draw windows with replacement, or each once in an epoch, in an order of its own"
    )
    max_steps: int = setting(
        5000, "updates in the run, and the length of the learning-rate schedule", low=1, high=10**9
    )
    max_time: float | None = setting(
        None,
        "stop after this time (90, 10m, 2h), including the time before a resume; "
        "does not change the learning-rate schedule",
        above=0.0,
        unit="duration",
    )
    eval_every: int = setting(250, "steps between evaluations", low=1)
    eval_tokens: int = setting(2**20, "validate on at most this many tokens, evenly spread", low=1)
    log_every: int = setting(10, "steps between training records in metrics.jsonl", low=1, high=10**6)
    save_every: int | float | None = setting(
        None,
        "steps between checkpoints, or a duration with its unit: 500, 10m (default: eval_every)",
        low=1,
        unit="steps or duration",
    )
    keep: int = setting(2, "newest checkpoints to keep, besides the best", low=1)
    patience: int | None = setting(None, "stop after this many evaluations in a row without improvement", low=1)

    warmup_steps: int | None = setting(None, "steps of linear warm-up from 0 (default: 2 % of max_steps)", low=0)
    max_lr: float = setting(3e-4, "peak learning rate", above=0.0, high=100.0)
    min_lr: float | None = setting(None, "final learning rate (default: max_lr / 10)", low=0.0, high=100.0)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = setting(
        "cosine", "shape of the learning rate after the warm-up; wsd: stable, then a linear cool-down"
    )
    decay_fraction: float | None = setting(
        None, "wsd: share of max_steps in the cool-down (default: 0.4)", above=0.0, high=1.0
    )
    optimizer: Literal["adamw", "muon"] = setting(
        "adamw", "adamw; or muon: Muon for the matrices of the blocks, AdamW for the rest"
    )
    muon_lr: float = setting(0.02, "Muon: peak learning rate of the matrices of the blocks", above=0.0, high=100.0)
    muon_momentum: float = setting(0.95, "Muon: decay rate of the mean gradient", low=0.0, high=0.999999)
    beta1: float = setting(0.9, "AdamW: decay rate of the mean gradient", low=0.0, high=0.999999)
    beta2: float = setting(0.95, "AdamW: decay rate of the mean squared gradient", low=0.0, high=0.9999999)
    weight_decay: float = setting(0.01, "weight decay", low=0.0, high=100.0)
    weight_decay_split: bool = setting(False, "apply no weight decay to norms, biases and embeddings")
    ema: float = setting(
        0.0,
        "decay of an exponential moving average of the weights, such as 0.999, evaluated beside them; 0: none",
        low=0.0,
        high=0.999999,
    )
    grad_clip: float = setting(0.0, "clip the gradient to this norm; 0 turns clipping off", low=0.0)

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "precision of matrix products; auto: bfloat16 where it is fast, else float32"
    )
    device: str = setting("auto", "auto, cpu, mps, cuda or cuda:N")
    compile: bool = setting(False, "torch.compile the model")
    parallel: Literal["ddp", "fsdp"] = setting(
        "ddp", "ddp: every process holds the whole model; fsdp: the model is sharded over the processes"
    )
    activation_checkpointing: bool = setting(
        False, "save memory: recompute each block's activations in the backward pass"
    )
    cpu_offload: bool = setting(False, "keep the shards of fsdp in host memory")
    seed: int = setting(1337, "seed of initial weights, batches and dropout", low=0, high=2**63 - 1)
    init_from: str | None = setting(
        None, "start from weights: a run folder, a .pt file, a folder in Hugging Face's format or its name on the hub"
    )
    teacher: tuple[str, ...] = setting(
        (), "learn from what these weights predict, too (distillation): finished runs, or what init_from takes"
    )
    teacher_share: float = setting(
        0.8, "teacher: their share of the target; the rest is the text's token", above=0.0, high=1.0
    )
    sample_prompt: str | None = setting(
        None, "prompt of the sample at each evaluation (default: ROMEO: or a line break)"
    )
    sample_tokens: int = setting(100, "tokens in the sample at each evaluation; 0 turns samples off", low=0, high=10**5)

    def __post_init__(self) -> None:
        validate(self)
        if self.warmup >= self.max_steps:
            raise UserError(
                f"warmup_steps = {self.warmup} is not below max_steps = {self.max_steps}; lower it, or raise max_steps"
            )
        if self.final_lr > self.max_lr:
            raise UserError(f"min_lr = {self.min_lr} is above max_lr = {self.max_lr}; lower it, or raise max_lr")
        if self.decay_fraction is not None and self.schedule != "wsd":
            raise UserError(
                f"decay_fraction = {self.decay_fraction}: works with schedule = 'wsd' only, and it is "
                f"{self.schedule!r}; leave one of them out"
            )
        if self.optimizer != "muon":
            unused = f"optimizer = {self.optimizer!r} does not use it; leave it out, or give --optimizer muon"
            self._check_default(MUON_SETTINGS, unused)
        if not self.teacher:
            self._check_default(TEACHER_SETTINGS, "there is no teacher; leave it out, or give --teacher RUN")

    def _check_default(self, names: tuple[str, ...], unused: str) -> None:
        for name in names:
            if getattr(self, name) != TRAIN_FIELDS[name].default:
                raise UserError(f"{name} = {getattr(self, name)}: {unused}")

    @property
    def warmup(self) -> int:
        """Steps of warm-up: `warmup_steps`, or 2 % of the steps (100 of the chapter's 5,000)."""
        return self.max_steps // 50 if self.warmup_steps is None else self.warmup_steps

    @property
    def final_lr(self) -> float:
        """Learning rate at the last step: `min_lr`, or the usual tenth of the peak."""
        if self.min_lr is not None:
            return self.min_lr
        return float(f"{self.max_lr / 10:.12g}")  # rounded to 12 digits: 3e-4 / 10 is not 3e-5 in binary

    @property
    def cooldown(self) -> float:
        """Share of `max_steps` in the cool-down of wsd: `decay_fraction`, or 0.4."""
        return 0.4 if self.decay_fraction is None else self.decay_fraction

    @property
    def windows_per_step(self) -> int:
        """Windows in one step, over all processes."""
        return self.batch_size * self.gradient_accumulation_steps

    def share(self, processes: int) -> tuple[int, int]:
        """Return (windows, micro-batches) of one process in a step. `processes` must divide `windows_per_step`."""
        windows = self.windows_per_step // processes
        return windows, math.ceil(windows / self.batch_size)

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one step, over all processes."""
        return self.windows_per_step * self.model.block_size


MODEL_FIELDS = {f.name: f for f in dataclasses.fields(GPTConfig) if f.name != "vocab_size"}

TRAIN_FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig) if f.name != "model"}

MUON_SETTINGS = ("muon_lr", "muon_momentum")  # apply to optimizer = "muon" only

TEACHER_SETTINGS = ("teacher_share",)  # apply with teachers only

FIELDS = TRAIN_FIELDS | MODEL_FIELDS  # every flag of `train`, by name
