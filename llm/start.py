"""What begins a run and what resumes one: everything checked, built and locked before the first step."""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm import __version__, checkpoint, metrics, storage
from llm.config import MODEL_FIELDS, GPTConfig, TrainConfig, coerce, from_settings, to_settings, write_toml
from llm.data import TokenData, open_data
from llm.device import DTYPES, choose_device, choose_dtype, environment, fast_products, keep_memory, precision
from llm.distributed import ALONE, World
from llm.errors import Failure, UserError
from llm.foreign import characters
from llm.live import LiveRun
from llm.loss import linear_cross_entropy
from llm.model import GPT
from llm.optim import make_optimizer
from llm.parallel import check_parallel, exchanging, recompute_activations, shard_model
from llm.prepare import default_folder, ensure, made_from, unused
from llm.run_data import beside, open_run_data, places_of
from llm.samples import Samples
from llm.state import Parts, Progress, newest_state, restore
from llm.tokenizer import Tokenizer, gpt2, load_tokenizer, save_tokenizer
from llm.tokens import GPT2_VOCAB
from llm.weights import read_weights, run_config, weights_file

# what a resumed run may change: none of it alters a batch, a draw or the shape of the model
RESUMABLE = {
    *("max_steps", "max_time", "patience", "eval_every", "eval_tokens", "log_every", "save_every", "keep"),
    *("data_dir", "out_dir", "device", "compile", "sample_prompt", "sample_tokens"),
    *("parallel", "activation_checkpointing", "cpu_offload"),
}
SPLIT = "batch_size x gradient_accumulation_steps"  # of a step's windows: another split of the same is the same run
OURS = (
    *(
        "config.toml",
        "metrics.jsonl",
        "env.json",
        "tokenizer.json",
        "samples.jsonl",
        "samples.txt",
        "loss_curve.png",
        "refused.json",
    ),
    "report.html",
)
WEIGHTS = ("model.pt", "best.pt")
Say = Callable[[str], None]


@contextmanager
def new_run(
    config: TrainConfig,
    overwrite: bool = False,
    say: Say = lambda _: None,
    progress: Any = None,
    world: World = ALONE,
) -> Iterator[LiveRun]:
    """A new run, ready to iterate over. The folder is locked until the block ends.

    Everything is checked before the run folder is touched; the text may have been tokenized by then. Of several
    processes the leading one alone touches that folder.
    Raises UserError where it cannot work.
    """
    out_dir = Path(config.out_dir)
    with contextlib.ExitStack() as stack:
        with world.together():
            device = choose_device(config.device, local_rank(world))
            dtype = DTYPES[world.first(lambda: name_of(choose_dtype(config.dtype, device)))]
            check_parallel(config, world, dtype)
            if world.leads:
                refuse_existing(out_dir, overwrite)
                if out_dir.resolve() == Path(config.data_dir or default_folder(config)).resolve():
                    raise UserError(
                        f"out_dir = {out_dir}: is the folder of the token files; choose another for the run"
                    )
                storage.check_writable(out_dir)
            weights = given = None
            if config.init_from:
                config, weights, given = starting_point(config, say)
            world.gather(None)  # the leader was content so far
            data, tokenizer = open_text(config, say, progress, given, world)
            if weights is None:
                vocab_size = config.vocab_size or data.vocab_size
                config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))
            else:
                check_tokens(config, data, given, tokenizer)
            prompt = config.sample_prompt or default_prompt(data, tokenizer)
            if tokenizer is not None:
                tokenizer.encode(prompt)  # says now if it has a character that is not in the vocabulary
            config = resolved(config, data, dtype, prompt)
            agree(config, data, device, world)
        parts = build(config, data, tokenizer, device, dtype, world, weights)
        with world.together():
            if world.leads:
                storage.check_writable(out_dir, disk_needed(parts.model, config))
                stack.enter_context(storage.locked(out_dir, "this run folder"))
                refuse_existing(out_dir, overwrite)
                clear(out_dir)
                storage.write_text(out_dir / "config.toml", write_toml(config))
                write_environment(out_dir, data)
                if tokenizer is not None:
                    save_tokenizer(tokenizer, out_dir / "tokenizer.json")
                say_limits(say)
            world.begun()
        connect(parts, say)
        yield LiveRun(parts, out_dir, Progress(), prompt)


def local_rank(world: World) -> int | None:
    """By which a process chooses its device; None where one process has all."""
    return world.local_rank if world.size > 1 else None


def agree(config: TrainConfig, data: TokenData, device: torch.device, world: World) -> None:
    """Raises UserError naming what is not the same for all processes: versions, code, tokens, settings, device."""
    settings = {name: value for name, value in to_settings(config).items() if name not in ("out_dir", "data_dir")}
    versions = {"losscurve": __version__, "torch": torch.__version__, "python": platform.python_version()}
    facts = {**versions, "the code of losscurve": code_hash(), **data.hashes, **settings, "device": device.type}
    world.agree(facts)


def code_hash() -> str:
    """SHA-256 over the Python files of the package."""
    digest, here = hashlib.sha256(), Path(__file__).parent
    for path in sorted(here.rglob("*.py")):
        digest.update(f"{path.relative_to(here)} {storage.sha256(path)}".encode())
    return digest.hexdigest()


def check_tokens(config: TrainConfig, data: TokenData, given: Tokenizer | None, tokenizer: Tokenizer | None) -> None:
    """Raises UserError where the weights of `init_from`, with the tokenizer `given`, know other tokens than `data`."""
    same = given is None or tokenizer is None or given.to_json() == tokenizer.to_json()
    if config.model.vocab_size < data.vocab_size or not same:
        raise UserError(
            f"{data.folder}: its tokens are not those that {config.init_from} was trained on; "
            f"give the text by --text with another --data_dir, and it is prepared with the right ones"
        )


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
def resume_run(
    out_dir: Path, changes: dict[str, Any], say: Say = lambda _: None, world: World = ALONE
) -> Iterator[LiveRun]:
    """The run in `out_dir`, going on from its newest saved state that verifies, in as many processes as there are.

    `changes` are settings that differ from the run's own, of those in RESUMABLE. Raises UserError
    for others, for a run that is not there, and for one that is complete.
    """
    with contextlib.ExitStack() as stack:
        with world.together():
            before = from_settings(world.first(lambda: to_settings(run_config(out_dir))))
            text = () if world.restarted else coerce("text", changes.get("text", ()))  # else it is the same command
            config = changed(before, as_the_run(before, out_dir, changes) | {"out_dir": out_dir})
            device = choose_device(config.device, local_rank(world))
            check_parallel(config, world, DTYPES[config.dtype])
            if world.leads:
                stack.enter_context(storage.locked(out_dir, "this run folder"))
            groups, facts, passed_over = newest_state(out_dir, world)
            check_same_settings(out_dir, before, facts)
            check_unfinished(config, facts.get("progress", {}))
            data = open_run_data(out_dir, before, facts.get("data"), changes.get("data_dir"), say)
            if text and world.leads:
                check_same_text(text, config, data.folder, say)
            config = from_settings({"data_dir": beside(data.folder, out_dir)}, config)
            tokenizer = run_tokenizer(out_dir, config.model.vocab_size, say, data.folder)
            agree(config, data, device, world)
        parts = build(config, data, tokenizer, device, DTYPES[config.dtype], world)
        restored = restore(parts, groups, facts)
        with world.together():
            if world.leads:
                storage.check_writable(out_dir, disk_needed(parts.model, config))
                for state, reason in passed_over.items():
                    say(f"passed over a saved state: {reason}; it is now {checkpoint.set_aside(state).name}")
                say_changes(out_dir, data, say)
                if config.max_steps != before.max_steps:
                    then, now = before.max_steps, config.max_steps
                    say(f"max_steps was {then} and is {now}: the schedule changes from here on")
                if (then_split := split_of(before)) != (now_split := split_of(config)):
                    say(
                        f"{SPLIT} was {then_split} and is {now_split}: the same windows, and losses that may differ in "
                        f"their last digits"
                    )
                if config != before:
                    storage.write_text(out_dir / "config.toml", write_toml(config))
                metrics.cut(out_dir, restored.step)
                Samples(out_dir).cut(restored.step)
                say_limits(say)
            world.begun()
        connect(parts, say)
        yield LiveRun(parts, out_dir, restored, config.sample_prompt or "\n")


def say_limits(say: Say) -> None:
    """Say what the file systems written to so far do not promise."""
    for limit in storage.limits():
        say(limit)


def check_same_settings(out_dir: Path, config: TrainConfig, facts: dict[str, Any]) -> None:
    """Raises UserError if config.toml is not what the saved state was trained with."""
    saved, now = facts.get("settings"), json.loads(json.dumps(to_settings(config)))
    if not isinstance(saved, dict):
        raise UserError(f"{out_dir}: its saved state is of another version (no settings in state.json)")
    if name := another_run(saved, now):
        ours, theirs = ({**settings, **decisive(settings)}.get(name) for settings in (now, saved))
        raise UserError(
            f"{out_dir / 'config.toml'}: {name} is {ours!r}, and the saved state was trained with {theirs!r}; "
            f"put that back"
        )


def as_the_run(config: TrainConfig, out_dir: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` without those that name what the run has: "auto", which it has chosen, its start by another spelling,
    and its text, which `check_same_text` compares.
    """
    kept = {name: value for name, value in changes.items() if name != "text" and (name, value) != ("dtype", "auto")}
    if config.init_from and kept.get("init_from"):
        given = Path(os.path.abspath(str(kept["init_from"])))
        if given in {Path(os.path.abspath(place)) for place in places_of(config.init_from, out_dir, config)}:
            del kept["init_from"]
    return kept


def check_same_text(text: tuple[str, ...], config: TrainConfig, folder: Path, say: Say) -> None:
    """Raises UserError where `text`, by its content, is not what the token files of a run were made from."""
    if not made_from(folder, dataclasses.replace(config, text=text), say=say):
        tokens = unused(f"{default_folder(TrainConfig(text=text))}-for-{Path(config.out_dir).resolve().name}")
        raise UserError(
            f"text = {' '.join(text)}: not the text that {folder} was made from; leave --text out to go on with that, "
            f"or train on it with: {new_run_command(config, {'text': text, 'data_dir': tokens})}"
        )


def another_run(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """The first setting that differs and that a resumed run may not change; None if there is none."""
    before, after = decisive(before), decisive(after)
    return next((name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)), None)


def decisive(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that make a run the run it is; how a step's windows are split counts by their number alone."""
    size, steps = (settings.get(name, 0) for name in SPLIT.split(" x "))
    kept = {name: value for name, value in settings.items() if name not in {*RESUMABLE, *SPLIT.split(" x ")}}
    return kept | {SPLIT: size * steps}


def say_changes(out_dir: Path, data: TokenData, say: Say) -> None:
    """Say what is not as it was when the run began (env.json): the last digits of its numbers may change with it."""
    try:
        then = storage.read_json(out_dir / "env.json")
    except UserError:
        then = None
    now = json.loads(json.dumps(environment()))
    if not isinstance(then, dict):
        say(f"{out_dir / 'env.json'}: not readable, so nobody can tell if this machine is the one the run began on")
        then = {}
    changes = [f"{key} was {then.get(key)} and is {now[key]}" for key in now if key in then and then[key] != now[key]]
    if changes:
        say(f"{'; '.join(changes)}: from here on the run may differ in its last digits")
    if changes or not then:
        write_environment(out_dir, data)


def changed(config: TrainConfig, changes: dict[str, Any]) -> TrainConfig:
    """A run's settings with `changes` laid over them. Raises UserError for one that would be another run."""
    wanted = from_settings(changes, config)
    name = another_run(before := to_settings(config), after := to_settings(wanted))
    if name == SPLIT:
        raise UserError(
            f"{name} was {split_of(config)} = {config.windows_per_step} windows a step in this run and cannot become "
            f"{split_of(wanted)} = {wanted.windows_per_step} on --resume; {same_windows(config, wanted)}"
        )
    if name:
        raise UserError(
            f"{name} was {before.get(name)!r} in this run and cannot become {after.get(name)!r} on --resume; "
            f"leave it out, or start another run with: {new_run_command(config, {name: after.get(name)})}"
        )
    return wanted


def split_of(config: TrainConfig) -> str:
    return f"{config.batch_size} x {config.gradient_accumulation_steps}"


def same_windows(config: TrainConfig, wanted: TrainConfig) -> str:
    """How to have the windows of a step of `config` in micro-batches of about the size that was wanted."""
    windows, most = config.windows_per_step, wanted.batch_size
    if most == config.batch_size:  # more micro-batches alone were asked for
        most = max(1, windows // wanted.gradient_accumulation_steps)
    size = next(size for size in range(min(most, windows), 0, -1) if windows % size == 0)
    flags = f"--batch_size {size} --gradient_accumulation_steps {windows // size}"
    return f"split the same {windows} otherwise, with {flags}"


def new_run_command(config: TrainConfig, changes: dict[str, Any]) -> str:
    """The command for a run like that of `config` with `changes`; from its weights, if they fit."""
    out_dir = config.out_dir.rstrip("/")
    words = ["losscurve", "train", "--preset", f"{out_dir}/config.toml"]
    if not changes.keys() & (MODEL_FIELDS.keys() - {"dropout"} | {"vocab_size", "tokenizer", "init_from"}):
        words += ["--init_from", out_dir]
    for name, value in changes.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join([*words, "--out_dir", unused(f"{out_dir}-2")])


def check_unfinished(config: TrainConfig, progress: dict[str, Any]) -> None:
    """Raises UserError where the run has nothing left to do."""
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
    states = [out_dir / checkpoint.folder_name(step) for step in checkpoint.saved_steps(out_dir)]
    for folder in (*states, *out_dir.glob("damaged-step-*")):
        storage.remove_folder(folder)
    for name in (*OURS, *WEIGHTS, "latest", "best"):
        (out_dir / name).unlink(missing_ok=True)


def open_text(
    config: TrainConfig, say: Say, progress: Any, given: Tokenizer | None, world: World
) -> tuple[TokenData, Tokenizer | None]:
    """The token files a config asks for, prepared first (with the tokenizer `given`) where need be; their tokenizer.

    The leading process looks after them first, then the first of each other machine, which may see the same folder.
    """
    folder = Path(config.data_dir or default_folder(config))
    for turn in (world.leads, world.local_rank == 0 and not world.leads):
        if turn:
            ensure(config, progress=progress, say=say, given=given)
        world.gather(None)
    data = open_data(folder, config.model.block_size, config.vocab_size)
    if not data.foreign:
        return data, load_tokenizer(folder / "tokenizer.json")
    if alphabet := characters(folder):
        say(f"{folder}: no meta.json; by its meta.pkl the ids are {data.vocab_size} characters")
        return data, alphabet
    say(f"{folder}: no meta.json, so its ids are taken for GPT-2's ({data.vocab_size} tokens)")
    if data.vocab_size != GPT2_VOCAB:
        return data, None
    try:
        return data, gpt2()
    except Failure as error:
        say(f"no samples and no bits per byte: {error}")
        return data, None


def run_tokenizer(out_dir: Path, vocab_size: int, say: Say, data_dir: Path | None = None) -> Tokenizer | None:
    """The run's own, or that of its token files on a machine that does not see the run folder; GPT-2's for a run on
    tokens of unknown origin, or None where that is not to be had.
    """
    for path in (out_dir / "tokenizer.json", (data_dir or out_dir) / "tokenizer.json"):
        if path.exists():
            return load_tokenizer(path)
    if data_dir and (alphabet := characters(data_dir)):
        return alphabet
    try:
        return gpt2() if vocab_size >= GPT2_VOCAB else None
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
        "data_dir": beside(data.folder, Path(config.out_dir)),
        "vocab_size": config.model.vocab_size,
        "warmup_steps": config.warmup,
        "min_lr": config.final_lr,
        "dtype": name_of(dtype),
        "sample_prompt": prompt,
    }
    return from_settings(chosen, config)


def name_of(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def build(
    config: TrainConfig,
    data: TokenData,
    tokenizer: Tokenizer | None,
    device: torch.device,
    dtype: torch.dtype,
    world: World = ALONE,
    weights: dict[str, Tensor] | None = None,
) -> Parts:
    """Model, optimizer and loss scaling, with the initial weights that the seed decides, or those given."""
    keep_memory()
    fast_products(device)
    torch.manual_seed(config.seed)
    model = GPT(config.model)
    if weights is not None:
        model.load_state_dict(weights)
    model.to(device)
    if config.activation_checkpointing:
        recompute_activations(model)
    if config.parallel == "fsdp" and world.started:
        shard_model(model, world, device, dtype, config.cpu_offload)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return Parts(config, model, model, make_optimizer(model, config), scaler, data, tokenizer, device, dtype, world)


def connect(parts: Parts, say: Say) -> None:
    """The forward to train by: compiled where that is asked for, its gradients exchanged where there are several."""
    if parts.config.compile:
        compile_forward(parts, say)
    if parts.config.parallel == "fsdp" and not parts.world.started:
        say("parallel = 'fsdp' needs torchrun; in this one process there is nothing to share")
    parts.forward, parts.exchange = exchanging(parts.model, parts.forward, parts.world)
    if parts.config.parallel == "ddp" and parts.world.size > 1:
        # DDP settles what it adds up together, and so in which order, after the first backward: a resumed run would
        # take its first step in another order than the run that was never stopped
        try_out(parts, parts.forward)


def try_out(parts: Parts, forward: Callable[..., Any]) -> None:
    """Forward and backward as in a step, of nothing and for nothing."""
    config = parts.config
    windows = min(config.batch_size, config.share(parts.world.size)[0])
    ids = torch.zeros(windows, config.model.block_size, dtype=torch.int64, device=parts.device)
    try:
        with precision(parts.dtype, parts.device):
            loss: Any = forward(ids, ids, ids[:, 0].int())[1]
        loss.backward()
    finally:
        parts.model.zero_grad(set_to_none=True)


def compile_forward(parts: Parts, say: Say) -> None:
    """Train through torch.compile; where it cannot work here, say so in one line and go on without.

    The blocks are compiled; the loss stays as it is, since it is one product after another, and so does the
    embedding: compiled code adds up its gradient in the order in which threads happen to come.
    """
    model = parts.model
    stream = torch.compile(model.stream)

    def forward(idx: Tensor, targets: Tensor, seeds: Tensor) -> tuple[None, Tensor]:
        return None, linear_cross_entropy(stream(model.wte(idx), seeds=seeds), model.lm_head.weight, targets)

    try:
        try_out(parts, forward)
        parts.forward = forward
    except Exception as error:  # whatever a compiler can raise: the run does not depend on it
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        say(f"torch.compile does not work here, training without it ({reason})")


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
