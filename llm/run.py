"""A run folder as an object, what begins or resumes one, and `fit` for notebooks."""

import contextlib
import dataclasses
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llm import __version__, checkpoint, metrics, storage
from llm.config import MODEL_FIELDS, GPTConfig, TrainConfig, from_settings, read_toml, to_settings, write_toml
from llm.data import GPT2_VOCAB, TokenData, open_data
from llm.device import DTYPES, choose_device, choose_dtype, environment, keep_memory, precision
from llm.errors import Failure, UserError
from llm.generate import continue_text
from llm.loss import linear_cross_entropy
from llm.metrics import Row
from llm.model import GPT
from llm.optim import make_optimizer
from llm.plot import draw, plot_runs
from llm.prepare import default_folder, ensure
from llm.tokenizer import Tokenizer, gpt2, load_tokenizer, save_tokenizer
from llm.train import Line, Progress, Trainer, Training, restore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# what a resumed run may change: none of it alters a batch, a draw or the shape of the model
RESUMABLE = {
    *("max_steps", "max_time", "patience", "eval_every", "eval_tokens", "log_every", "save_every", "keep"),
    *("data_dir", "out_dir", "device", "compile", "sample_prompt", "sample_tokens"),
}
OURS = ("config.toml", "metrics.jsonl", "env.json", "tokenizer.json", "samples.txt", "loss_curve.png")
WEIGHTS = ("model.pt", "best.pt")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """A run folder: its settings, record, weights and tokenizer."""

    path: Path
    config: TrainConfig

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """The run in the folder `path`. Raises UserError where there is none."""
        folder = Path(path)
        if not (folder / "config.toml").is_file():
            raise UserError(f"{folder}: no run here (no config.toml); train one with --out_dir {folder}")
        return cls(folder, from_settings(read_toml(str(folder / "config.toml"))))

    @property
    def record(self) -> list[Row]:
        """The rows of metrics.jsonl."""
        return metrics.read_record(self.path)

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's own; for a run on token files of unknown origin, GPT-2's."""
        path = self.path / "tokenizer.json"
        return load_tokenizer(path) if path.exists() else gpt2()

    def model(self, weights: str = "last", device: str = "auto") -> GPT:
        """The trained model, of the "last" or the "best" weights, in evaluation mode."""
        names = {"last": "model.pt", "best": "best.pt"}
        if weights not in names:
            raise UserError(f"weights = {weights!r}: expected last or best")
        return load_model(self.path / names[weights], choose_device(device), self.config.model)

    def sample(
        self,
        prompt: str | None = None,
        max_new_tokens: int = 100,
        seed: int | None = None,
        weights: str = "last",
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
    ) -> str:
        """`prompt` (default: the run's own) and its continuation by the "last" or "best" weights."""
        model, tokenizer = self.model(weights), self.tokenizer
        prompt = prompt if prompt is not None else self.config.sample_prompt or "\n"
        knobs = (temperature, top_k, top_p)
        tokens = continue_text(model, tokenizer, prompt, max_new_tokens, seed, 1, *knobs)
        return prompt + tokenizer.decode([token for (token,) in tokens])

    def _repr_png_(self) -> bytes:
        """What a notebook shows of a run: its loss curve."""
        picture = io.BytesIO()
        draw([self.path]).savefig(picture, format="png")
        return picture.getvalue()

    def plot(self, out: str | Path | None = None) -> "Figure":
        """The loss curve as a figure, which a notebook shows; also written to `out` where given."""
        if out is not None:
            plot_runs([self.path], Path(out))
        return draw([self.path])


def fit(
    text: str | Path | list[str | Path] | None = None,
    *,
    out_dir: str | Path = "checkpoints",
    preset: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    say: Say = print,
    **settings: Any,
) -> Run:
    """Train on a text (a path, several, or "shakespeare") and return the run; for notebooks.

    `settings` are the fields of `TrainConfig` and `GPTConfig`; each evaluation is told to `say`. An
    interrupt saves; `resume=True` goes on. Raises UserError for settings that cannot work.
    """
    given = settings | ({} if text is None else {"text": text}) | {"out_dir": out_dir}
    if resume:
        opened = resumed(Path(out_dir), given, say=say)
    else:
        config = from_settings((read_toml(preset) if preset else {}) | given)
        opened = begun(config, overwrite=overwrite, say=say)
    with opened as training, interrupts() as caught:
        training.stop = lambda: bool(caught)
        for event in training:
            if isinstance(event, Line):
                say(str(event))
    if caught:
        say(f"saved step {training.progress.step}; go on with fit(out_dir={str(out_dir)!r}, resume=True)")
    return Run.open(out_dir)


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Ctrl-C, SIGTERM and a closed terminal are noted in the list this yields, once; a second one leaves at once.

    Signals that are ignored (nohup) stay so; outside the main thread, where Python allows no handlers,
    none are set.
    """
    caught: list[int] = []

    def note(number: int, frame: object) -> None:
        if caught:
            os._exit(128 + number)
        caught.append(number)
        with contextlib.suppress(OSError):  # the terminal may be what went away
            print("finishing this step, then saving (again: leave at once)", file=sys.stderr)

    wanted = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in wanted}
    if threading.current_thread() is not threading.main_thread():
        before = {}
    for number in [number for number, handler in before.items() if handler != signal.SIG_IGN]:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def begun(
    config: TrainConfig, overwrite: bool = False, say: Say = lambda _: None, progress: Any = None
) -> Iterator[Training]:
    """A new run, ready to iterate over. The folder is locked until the block ends.

    Everything is checked before anything is written. Raises UserError where it cannot work.
    """
    out_dir = Path(config.out_dir)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    refuse_existing(out_dir, overwrite)
    if out_dir.resolve() == Path(config.data_dir or default_folder(config)).resolve():
        raise UserError(f"out_dir = {out_dir}: is the folder of the token files; choose another for the run")
    storage.check_writable(out_dir)
    weights = given = None
    if config.init_from:
        config, weights, given = starting_point(config, say)
    data, tokenizer = open_text(config, say, progress, given)
    if weights is None:
        vocab_size = config.vocab_size or data.vocab_size
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))
    elif config.model.vocab_size < data.vocab_size or (given and tokenizer and given.to_json() != tokenizer.to_json()):
        raise UserError(
            f"{data.folder}: its tokens are not those that {config.init_from} was trained on; "
            f"give the text by --text with another --data_dir, and it is prepared with the right ones"
        )
    prompt = config.sample_prompt or default_prompt(data, tokenizer)
    if tokenizer is not None:
        tokenizer.encode(prompt)  # says now if it has a character that is not in the vocabulary
    config = resolved(config, data, dtype, prompt)
    trainer = build(config, data, tokenizer, device, dtype)
    if weights is not None:
        trainer.model.load_state_dict(weights)
    storage.check_writable(out_dir, disk_needed(trainer.model, config))
    with storage.locked(out_dir, "this run folder"):
        refuse_existing(out_dir, overwrite)
        clear(out_dir)
        storage.write_text(out_dir / "config.toml", write_toml(config))
        write_environment(out_dir, data)
        if tokenizer is not None:
            save_tokenizer(tokenizer, out_dir / "tokenizer.json")
        if config.compile:
            compile_forward(trainer, say)
        yield Training(trainer, out_dir, Progress(), prompt)


def starting_point(config: TrainConfig, say: Say) -> tuple[TrainConfig, dict[str, Tensor], Tokenizer | None]:
    """What `init_from` means for a config: its shape and kind of tokens; the weights; the run's own tokenizer.

    Raises UserError where a size or a tokenizer was asked for that the weights do not have.
    """
    source = weights_file(str(config.init_from))
    shape, weights = read_weights(source, config.model)
    for name in MODEL_FIELDS.keys() - {"dropout"}:
        asked, saved = getattr(config.model, name), getattr(shape, name)
        if asked not in (saved, getattr(GPTConfig(), name)):
            raise UserError(f"{name} = {asked}: the weights of {config.init_from} have {saved}; leave it out")
    given, kind = None, "gpt2"
    if source.with_name("tokenizer.json").exists():
        given = load_tokenizer(source.with_name("tokenizer.json"))
        kind = given.kind
    elif shape.vocab_size < GPT2_VOCAB:
        raise UserError(
            f"{source}: no tokenizer.json beside it says what its {shape.vocab_size} tokens are; give a run"
        )
    else:
        say(f"{source}: no tokenizer.json beside it, so GPT-2's tokens are assumed")
    if config.tokenizer not in ("auto", kind):
        raise UserError(
            f"tokenizer = {config.tokenizer!r}: the weights of {config.init_from} know {kind} tokens; leave it out"
        )
    changes: dict[str, Any] = {"tokenizer": kind}
    if kind in ("bpe", "char") and config.text and config.data_dir is None:  # the same kind, but not the same tokens
        folder = default_folder(dataclasses.replace(config, tokenizer="auto"))
        changes["data_dir"] = f"{folder}-for-{source.resolve().parent.name}"
    model = dataclasses.replace(shape, dropout=config.model.dropout)
    return dataclasses.replace(from_settings(changes, config), model=model), weights, given


@contextmanager
def resumed(out_dir: Path, changes: dict[str, Any], say: Say = lambda _: None) -> Iterator[Training]:
    """The run in `out_dir`, going on from its newest saved state that verifies.

    `changes` are settings that differ from the run's own, of those in RESUMABLE. Raises UserError
    for others, for a run that is not there, and for one that is complete.
    """
    run = Run.open(out_dir)
    config = changed(run.config, changes | {"out_dir": out_dir})
    device = choose_device(config.device)
    with storage.locked(out_dir, "this run folder"):
        groups, facts, passed_over = checkpoint.newest_state(out_dir)
        for reason in passed_over:
            say(f"passed over a saved state: {reason}")
        progress = facts["progress"]
        check_unfinished(config, progress)
        folder = Path(config.data_dir or "data")
        if not (folder / "train.bin").exists() and not storage.unfinished(folder):
            raise UserError(f"{folder}: the run's token files are not there (seen from here); say where by --data_dir")
        data = open_data(folder, config.model.block_size, config.model.vocab_size)
        tokenizer = run_tokenizer(run, say)
        trainer = build(config, data, tokenizer, device, DTYPES[config.dtype])
        restored = restore(trainer, groups, facts)
        storage.check_writable(out_dir, disk_needed(trainer.model, config))
        if config.max_steps != run.config.max_steps:
            say(f"max_steps was {run.config.max_steps} and is {config.max_steps}: the schedule changes from here on")
        if config != run.config:
            storage.write_text(out_dir / "config.toml", write_toml(config))
        metrics.cut(out_dir, restored.step)
        if config.compile:
            compile_forward(trainer, say)
        yield Training(trainer, out_dir, restored, config.sample_prompt or "\n")


def changed(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    """A run's settings with `changes` laid over them. Raises UserError for one that would be another run."""
    wanted = from_settings(changes, config)
    before, after = to_settings(config), to_settings(wanted)
    for name in sorted(set(before) | set(after)):
        if before.get(name) != after.get(name) and name not in RESUMABLE:
            raise UserError(
                f"{name} was {before.get(name)!r} in this run and cannot become {after.get(name)!r} on --resume; "
                f"leave it out, or start another run with --init_from {config.out_dir} --out_dir NEW"
            )
    return wanted


def check_unfinished(config: TrainConfig, progress: dict[str, Any]) -> None:
    step, seconds = progress["step"], progress["seconds"]
    if step >= config.max_steps:
        raise UserError(f"{config.out_dir}: complete at step {step}; give a larger --max_steps to go on")
    if config.max_time is not None and seconds >= config.max_time:
        raise UserError(f"{config.out_dir}: has used its max_time of {config.max_time:g} s; give a larger --max_time")
    if config.patience is not None and progress["stale"] >= config.patience:
        raise UserError(f"{config.out_dir}: patience ran out at step {step}; give a larger --patience to go on")


def refuse_existing(out_dir: Path, overwrite: bool) -> None:
    """Raises UserError, saying what is there, if `out_dir` holds a run and may not be overwritten."""
    found = [name for name in ("config.toml", "metrics.jsonl", *WEIGHTS) if (out_dir / name).exists()]
    states = checkpoint.saved_steps(out_dir)
    if (found or states) and not overwrite:
        there = f"a run saved at step {states[-1]}" if states else f"a run ({found[0]})"
        raise UserError(
            f"{out_dir}: holds {there}; go on with --resume, replace it with --overwrite, or choose another --out_dir"
        )


def clear(out_dir: Path) -> None:
    """Remove the files of an earlier run, and nothing else."""
    for step in checkpoint.saved_steps(out_dir):
        shutil.rmtree(out_dir / checkpoint.folder_name(step))
    for name in (*OURS, *WEIGHTS, "latest", "best"):
        (out_dir / name).unlink(missing_ok=True)


def open_text(
    config: TrainConfig, say: Say, progress: Any, given: Tokenizer | None
) -> tuple[TokenData, Tokenizer | None]:
    """The token files a config asks for, prepared first (with the tokenizer `given`) where need be; their tokenizer."""
    folder = ensure(config, progress=progress, say=say, given=given)
    data = open_data(folder, config.model.block_size, config.vocab_size)
    if not data.foreign:
        return data, load_tokenizer(folder / "tokenizer.json")
    say(f"{folder}: no meta.json, so its ids are taken for GPT-2's ({data.vocab_size} tokens)")
    if data.vocab_size != GPT2_VOCAB:
        return data, None
    try:
        return data, gpt2()
    except Failure as error:
        say(f"no samples and no bits per byte: {error}")
        return data, None


def run_tokenizer(run: Run, say: Say) -> Tokenizer | None:
    try:
        tokenizer = run.tokenizer
        return tokenizer if run.config.model.vocab_size >= tokenizer.vocab_size else None
    except Failure as error:
        say(f"no samples and no bits per byte: {error}")
        return None


def default_prompt(data: TokenData, tokenizer: Tokenizer | None) -> str:
    """The chapter's ROMEO: for its text (or one unknown), else a line break, else the text's first token."""
    if tokenizer is None:
        return "ROMEO:"
    first = tokenizer.decode(data.val[:1].tolist())
    for prompt in ("ROMEO:", "\n") if data.foreign or "shakespeare" in data.source else ("\n",):
        try:
            tokenizer.encode(prompt)
            return prompt
        except UserError:  # a character tokenizer that has never seen one of these
            continue
    return first


def resolved(config: TrainConfig, data: TokenData, dtype: torch.dtype, prompt: str) -> TrainConfig:
    """The config with everything that was chosen for it written out, so that a resume chooses nothing anew."""
    chosen = {
        "data_dir": data.folder,
        "vocab_size": config.model.vocab_size,
        "warmup_steps": config.warmup,
        "min_lr": config.final_lr,
        "dtype": next(name for name, known in DTYPES.items() if known == dtype),
        "sample_prompt": prompt,
    }
    return from_settings(chosen, config)


def build(
    config: TrainConfig, data: TokenData, tokenizer: Tokenizer | None, device: torch.device, dtype: torch.dtype
) -> Trainer:
    """Model, optimizer and loss scaling, with the initial weights that the seed decides."""
    keep_memory()
    torch.manual_seed(config.seed)
    model = GPT(config.model).to(device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return Trainer(config, model, model, make_optimizer(model, config), scaler, data, tokenizer, device, dtype)


def compile_forward(trainer: Trainer, say: Say) -> None:
    """Train through torch.compile; where it cannot work here, say so in one line and go on without.

    The hidden states are compiled; the loss stays as it is, since it is one product after another.
    """
    model, config = trainer.model, trainer.config
    hidden = torch.compile(model.hidden)

    def forward(idx: Tensor, targets: Tensor, seeds: Tensor) -> tuple[None, Tensor]:
        return None, linear_cross_entropy(hidden(idx, seeds=seeds), model.lm_head.weight, targets)

    ids = torch.zeros(config.batch_size, config.model.block_size, dtype=torch.int64, device=trainer.device)
    try:
        with precision(trainer.dtype, trainer.device):
            loss: Any = forward(ids, ids, ids[:, 0].int())[1]
        loss.backward()
        trainer.forward = forward
    except Exception as error:  # whatever a compiler can raise: the run does not depend on it
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        say(f"torch.compile does not work here, training without it ({reason})")
    model.zero_grad(set_to_none=True)


def disk_needed(model: GPT, config: TrainConfig) -> int:
    """Bytes of a run at its largest: states of weights and two moments in fp32, and the two weight files."""
    size = 4 * sum(p.numel() for p in model.parameters())
    return size * (3 * (config.keep + 2) + 3)


def write_environment(out_dir: Path, data: TokenData) -> None:
    """Versions, machine, commit and data hashes, in env.json."""
    here = Path(__file__).parent
    asked = subprocess.run(
        ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ) if shutil.which("git") and (here.parent / ".git").exists() else None  # fmt: skip
    facts = {"losscurve": __version__, "commit": asked.stdout.strip() if asked else None, "data": data.hashes}
    storage.write_json(out_dir / "env.json", facts | environment())


def weights_file(source: str) -> Path:
    """The .pt file meant by a run folder (its best weights, else its last) or by the file itself."""
    path = Path(source)
    candidates = [path / "best.pt", path / "model.pt"] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UserError(f"{source}: no run and no .pt file there; give a run folder or a state_dict saved by torch.save")


def load_model(path: Path, device: torch.device, base: GPTConfig | None = None) -> GPT:
    """A model in evaluation mode with the weights of a .pt file. Raises UserError as `read_weights` does."""
    config, weights = read_weights(path, base or GPTConfig())
    model = GPT(config)
    model.load_state_dict(weights)
    return model.to(device).eval()


def read_weights(path: Path, base: GPTConfig) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The shape and the state_dict in a .pt file. Sizes come from the tensors; what these do not tell
    (heads, GELU, dropout) from the config.toml beside the file, else from `base`.

    Raises UserError where the file is not a state_dict of a `GPT`. Loading runs no code.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; train a model first, or give the path of a .pt file") from None
    except Exception as error:  # torch raises many kinds for a file that is not its own
        raise UserError(f"{path}: not a state_dict saved by torch.save ({type(error).__name__})") from None
    if (path.parent / "config.toml").exists():
        base = Run.open(path.parent).config.model
    try:
        vocab_size, n_embd = weights["wte.weight"].shape
        layers = {int(name.split(".")[1]) for name in weights if name.startswith("h.")}
        tied = weights["lm_head.weight"].data_ptr() == weights["wte.weight"].data_ptr()
        config = dataclasses.replace(
            base,
            vocab_size=vocab_size,
            block_size=weights["wpe.weight"].shape[0],
            n_layer=len(layers),
            n_embd=n_embd,
            ffn_mult=weights["h.0.mlp.c_fc.weight"].shape[0] // n_embd,
            bias="h.0.attn.c_attn.bias" in weights,
            tied_lm_head=tied,
        )
        with torch.device("meta"):
            expected = {name: p.shape for name, p in GPT(config).state_dict().items()}
    except (KeyError, ValueError, IndexError, AttributeError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: not the weights of a GPT of ours ({type(error).__name__}: {error})") from None
    for name in sorted(set(expected) | set(weights)):
        found = getattr(weights.get(name), "shape", None)
        if found != expected.get(name):
            raise UserError(f"{path}: {name} is {found and tuple(found)}, and this shape needs {expected.get(name)}")
    return config, weights
