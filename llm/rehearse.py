"""A rehearsal of a cluster run on one machine: the same settings with a smaller model, really run and really killed.

Several processes on the CPU train, save and lose one of them to SIGKILL; one process goes on alone, and what comes of
it is compared with a run that nothing happened to. What only the real settings can tell is looked at too.
"""

import contextlib
import dataclasses
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from llm import checkpoint, corpus, plan, prove
from llm.config import TrainConfig, from_settings, to_settings, write_toml
from llm.data import TokenData, open_data
from llm.device import DTYPES, choose_device, choose_dtype
from llm.distributed import ALONE, World
from llm.errors import Failure, UserError
from llm.metrics import read_record
from llm.model import GPT
from llm.parallel import check_parallel
from llm.prepare import default_folder, files_there, prepare
from llm.start import Say, check_tokens, disk_needed, name_of, open_text, starting_point
from llm.tokenizer import Tokenizer, load_tokenizer

LAYERS, WIDTH, CONTEXT, WINDOWS = 2, 64, 32, 2  # of the small model; windows in a micro-batch
STEPS, SAVE, EVALUATE = 16, 4, 8  # of the small run, and how often it saves and evaluates
EVAL_TOKENS = 3 * 2048  # three batches: among two processes one is left over
PIECE = 200_000  # characters of a text without token files
LIMIT = 300.0  # seconds for a job of a few; one that takes longer hangs
# how far apart two runs may be that add up in another order: losses in nats per token; weights, as the root of the mean
# square, in units of max_lr. Measured: 1e-6 and 2e-6 in float32, 8e-5 and 2e-2 in bfloat16; 1 or more where a resume
# forgets the optimizer's state
TOLERANCES = {"float32": (1e-4, 1e-2), "bfloat16": (1e-2, 0.1), "float16": (1e-2, 0.1)}
NOT_CHECKED = (
    "NCCL and GPUs, the network between machines, whether each machine sees the same files, "
    "the accelerator's memory and speed"
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """What came of one check: `good` is None for what the machines of the run have to be compared with."""

    name: str
    good: bool | None
    words: str


def shrunk(config: TrainConfig, nproc: int, world_size: int) -> TrainConfig:
    """`config` with a model and a run small enough for seconds, on the CPU.

    What can break stays: how processes share the work, precision, dropout, heads, biases, the vocabulary, clipping, the
    shape of the schedule, and whether a process accumulates micro-batches or has but a part of one.
    """
    model, (batch, micro_batches) = config.model, _dealt(config, nproc, world_size)
    head = min(model.n_embd // model.n_head, max(1, WIDTH // model.n_head))
    settings = {
        "n_layer": min(LAYERS, model.n_layer),
        "n_embd": model.n_head * head,
        "block_size": min(CONTEXT, model.block_size),
        "batch_size": batch,
        "gradient_accumulation_steps": micro_batches,
        "max_steps": STEPS,
        "warmup_steps": min(STEPS - 1, math.ceil(STEPS * config.warmup / config.max_steps)),
        "eval_every": EVALUATE,
        "eval_tokens": min(EVAL_TOKENS, config.eval_tokens),
        "save_every": SAVE,
        "log_every": 1,
        "keep": min(2, config.keep),
        "sample_tokens": min(5, config.sample_tokens),
        "device": "cpu",
        **{"compile": False, "init_from": None, "max_time": None, "patience": None, "sample_prompt": None},
    }
    return from_settings(settings, config)


def _dealt(config: TrainConfig, nproc: int, world_size: int) -> tuple[int, int]:
    """(batch_size, gradient_accumulation_steps) that give each of `nproc` processes micro-batches of the kind that each
    of `world_size` gets: a part of one, a whole one, several, or several of which the last is smaller.
    """
    share, batch = max(1, config.windows_per_step // world_size), config.batch_size
    if share < batch:
        return WINDOWS * nproc, 1
    if share % batch == 0:
        return WINDOWS, nproc * min(2, share // batch)
    part = next(number for number in range(2, nproc + 1) if nproc % number == 0)
    return part, nproc * (part + 1) // part  # `part` windows and one more for each


def changes(config: TrainConfig, small: TrainConfig) -> list[str]:
    """What was shrunk, from what to what, by setting."""
    before, after = to_settings(config), to_settings(small)
    names = [name for name in before if before[name] != after.get(name)]
    return [f"{name} {before[name]} -> {after.get(name, 'none')}" for name in names]


class Rehearsal:
    """The checks of `config` for `world_size` processes, rehearsed by `nproc` in `folder`, which is the caller's.

    `here`: the run is meant for this machine, whose disk and memory then have to do for it. Raises UserError for an
    `init_from` without weights that can be used.
    """

    def __init__(
        self, config: TrainConfig, nproc: int, world_size: int, here: bool, folder: Path, say: Say = lambda line: None
    ) -> None:
        self.config, self.nproc, self.world_size, self.here = config, nproc, world_size, here
        self.folder, self.whole, self.parts = folder, folder / "whole", folder / "parts"
        self.say = say
        self.given: Tokenizer | None = None  # that of weights to start from
        if config.init_from:
            self.config, _, self.given = starting_point(config, say)
        self.small = shrunk(self.config, nproc, world_size)
        threads = max(1, (os.cpu_count() or 1) // nproc)  # also for one process, which then adds up alike
        self.environment = {"OMP_NUM_THREADS": str(threads), "TMPDIR": str(folder)}  # torchrun leaves folders there
        self.job: subprocess.Popen[str] | None = None
        self.workers: list[int] = []  # its processes
        self.stages: dict[str, Callable[[], tuple[bool | None, str]]] = {
            "processes": self.split,
            "text": self.text,
            "disk": self.disk,
            "memory": self.memory,
            "training": self.train,
            "a kill": self.kill,
            "resuming": self.resume,
            "same run": self.compare,
        }

    def findings(self) -> Iterator[Finding]:
        """Each check as it is made; after one that raised an error the others, which need it, are not."""
        try:
            for name, stage in self.stages.items():
                try:
                    yield Finding(name, *stage())
                except (UserError, Failure) as error:
                    yield Finding(name, False, str(error))
                    return
        finally:
            self._end()

    def split(self) -> tuple[bool, str]:
        """Whether the real settings can be spread over the real number of processes."""
        config = self.config
        if self.world_size > 1 and config.device.startswith(("cuda:", "mps")):
            choose_device(config.device, 0)  # says that this is one device
        check_parallel(config, World(size=self.world_size), DTYPES.get(config.dtype, torch.float32))
        share, micro_batches = config.share(self.world_size)
        sizes = f"{share} each of {self.world_size} processes, in {micro_batches} micro-batches"
        return True, f"{config.windows_per_step} windows a step: {sizes}"

    def text(self) -> tuple[bool, str]:
        """Whether the tokens fit the vocabulary and the window; leaves what is trained on here."""
        config, given = self.config, self.given
        if "-" in config.text:
            raise UserError("text = '-': is read more than once here; make token files first, with losscurve prepare -")
        tokens = Path(config.data_dir or default_folder(config))
        self.prepared, where = bool(files_there(tokens)), ""
        if self.prepared:
            data, tokenizer = open_text(config, self.say, None, given, ALONE)
        else:
            tokens, all_of_it = _piece(config, self.folder, given, self.small.model.block_size, self.say)
            data, tokenizer = open_data(tokens, self.small.model.block_size), load_tokenizer(tokens / "tokenizer.json")
            where = "" if all_of_it else f"'s first {PIECE:,} characters"
            if all_of_it and len(data.train) <= config.model.block_size:
                needed = f"and a window of block_size = {config.model.block_size} needs one more than that"
                raise UserError(f"{len(data.train)} tokens in the text, {needed}; give more text or a smaller one")
        if config.init_from:
            check_tokens(config, data, given, tokenizer)
        if self.prepared and config.sample_prompt and tokenizer is not None:
            tokenizer.encode(config.sample_prompt)
        vocabulary = config.model.vocab_size if config.init_from else config.vocab_size or data.vocab_size
        self.config, self.small = (plan.with_vocabulary(c, vocabulary) for c in (config, self.small))
        self._settle(data)
        what = f"{tokens}" if self.prepared else f"the text{where}, tokenized here"
        return True, f"ids stay below {data.vocab_size:,}, the model has {vocabulary:,}; rehearsing on {what}"

    def _settle(self, data: TokenData) -> None:
        """Write what is decided to small.toml, so that every job finds the same."""
        dtype = choose_dtype(self.small.dtype, torch.device("cpu"))
        settled = {"text": (), "tokenizer": "auto", "data_dir": data.folder.resolve(), "dtype": name_of(dtype)}
        settled |= {"vocab_size": self.small.model.vocab_size, "out_dir": self.parts}
        self.small = from_settings(settled, self.small)
        self.preset = self.folder / "small.toml"
        self.preset.write_text(write_toml(self.small), encoding="utf-8")

    def disk(self) -> tuple[bool | None, str]:
        """Room for the states of the real model, and for its token files where they are still to be made."""
        with torch.device("meta"):
            needed = disk_needed(GPT(self.config.model), self.config)
        if not self.prepared:
            bytewise = {"char": "byte"}.get(self.config.tokenizer, self.config.tokenizer)  # else it reads all the text
            text = plan.text_of(from_settings({"tokenizer": bytewise}, self.config))
            needed += plan.disk(self.config, text.tokens)["token files"]
        out_dir = Path(self.config.out_dir).resolve()
        free = shutil.disk_usage(next(path for path in (out_dir, *out_dir.parents) if path.exists())).free
        words = f"{needed / 2**30:.2f} GiB for the states of {self.config.out_dir}"
        return self._enough(words + ("" if self.prepared else " and the token files"), needed, free)

    def memory(self) -> tuple[bool | None, str]:
        """What rank 0 holds in the memory of its host while a state of the real model is saved."""
        needed = plan.PROCESS + plan.COPIES * sum(plan.parameters(self.config.model).values())
        return self._enough(f"{needed / 2**30:.2f} GiB on the host of rank 0 to save", needed, plan.machine_memory())

    def _enough(self, words: str, needed: int, there: int | None) -> tuple[bool | None, str]:
        if there is None:
            return None, f"{words}; this system does not say what it has"
        found = f"{words}; {there / 2**30:.2f} here"
        if needed <= there:
            return True, found
        if self.here:
            return False, f"{found}; make room or train a smaller model (for other machines: give --world_size)"
        return None, f"{found}, so see that the machine of rank 0 has it"

    def train(self) -> tuple[bool, str]:
        """Several processes, until a state is on the disk."""
        began = time.monotonic()
        self.job = prove.start(["--nproc", str(self.nproc), "--preset", str(self.preset)], self.environment)
        while not self._saved():
            if self.job.poll() is not None and not self._saved():
                prove.finish(self.job)
                raise Failure("the run ended without having saved")
            _in_time(began, f"{self.nproc} processes")
            time.sleep(0.002)
        return True, f"{self.nproc} processes ({self.config.parallel}) trained and saved step {self._saved()}"

    def _saved(self) -> int:
        """The newest step saved by the run in parts, 0 if there is none after the start."""
        return max(checkpoint.saved_steps(self.parts), default=0)

    def kill(self) -> tuple[bool, str]:
        """SIGKILL to the last process; the others have to end, and what is on the disk to be whole."""
        assert self.job is not None
        self.workers = _children(self.job.pid)
        if len(self.workers) != self.nproc:
            raise Failure("the run was over before it could be killed; rehearse again")
        with contextlib.suppress(ProcessLookupError):  # it ended just now; what is saved will tell
            os.kill(self.workers[-1], signal.SIGKILL)
        began = time.monotonic()
        while self.job.poll() is None or _processes().keys() & set(self.workers):
            _in_time(began, "after one process was killed, the others")
            time.sleep(0.1)
        self.job.communicate()
        took = time.monotonic() - began
        _, facts, passed_over = checkpoint.newest_state(self.parts)
        if passed_over:
            raise Failure(f"saved and damaged: {next(iter(passed_over.values()))}")
        if facts["step"] == STEPS:
            raise Failure("the run was over before it could be killed; rehearse again")
        if self.job.returncode == 0:
            raise Failure("one of its processes was killed, and the run says that it ended well")
        self.job, self.workers, self.resumed_at = None, [], facts["step"]
        return True, f"one process killed for good: the others ended in {took:.0f} s; step {facts['step']} is whole"

    def resume(self) -> tuple[bool, str]:
        """One process goes on to the end."""
        self._alone(["--out_dir", str(self.parts), "--resume"])
        return True, f"one process went on from step {self.resumed_at} to {self._saved()}"

    def compare(self) -> tuple[bool, str]:
        """An undisturbed run in one process, and whether it came to the same."""
        self._alone(["--preset", str(self.preset), "--out_dir", str(self.whole)])
        loss, weight = differences(self.whole, self.parts)
        weight /= self.small.max_lr
        allowed = TOLERANCES[self.small.dtype]
        words = (
            f"losses within {loss:.1e} nats of an undisturbed run in one process (allowed {allowed[0]:g}), weights "
            f"{weight:.1e} of an update apart ({allowed[1]:g}), in {self.small.dtype}"
        )
        if loss <= allowed[0] and weight <= allowed[1]:  # false for NaN
            return True, words
        return False, f"NOT the same run: {words}; report this, and train in one process until it is mended"

    def _alone(self, words: list[str]) -> None:
        began = time.monotonic()
        self.job = prove.start(words, self.environment)
        while self.job.poll() is None:
            _in_time(began, "one process")
            time.sleep(0.02)
        prove.finish(self.job)
        self.job = None

    def _end(self) -> None:
        """End the job and its processes, which would otherwise go on without us."""
        if self.job is None:
            return
        running = {self.job.pid, *_children(self.job.pid)} if self.job.poll() is None else set()
        for pid in running | (_processes().keys() & set(self.workers)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.job.wait()
        if self.job.stderr:
            self.job.stderr.close()


def differences(whole: Path, parts: Path) -> tuple[float, float]:
    """Between two runs that ended: the largest of their losses (nats per token), the root mean square of their weights.

    Raises Failure where they did not take the same steps at the same learning rates, or not with the same batches
    refused.
    """
    records = [read_record(folder) for folder in (whole, parts)]
    for kind in ("step", "split", "lr", "tokens"):
        if [row[kind] for row in records[0]] != [row[kind] for row in records[1]]:
            raise Failure(f"NOT the same run: the {kind} of its rows in metrics.jsonl differ from an undisturbed run's")
    pairs = [(a["loss"], b["loss"]) for a, b in zip(*records, strict=True)]
    if any((a is None) != (b is None) for a, b in pairs):
        raise Failure("NOT the same run: another batch was refused than in an undisturbed run")
    losses = [abs(a - b) for a, b in pairs if a is not None]
    one, other = (checkpoint.newest_state(folder)[0]["model"] for folder in (whole, parts))
    apart = torch.cat([(one[name] - other[name]).flatten() for name in one])
    return max(losses, default=math.nan), float(apart.square().mean().sqrt())


def _piece(config: TrainConfig, folder: Path, given: Tokenizer | None, block_size: int, say: Say) -> tuple[Path, bool]:
    """(token files of the first PIECE characters of the text, whether that is all of it), made in `folder`."""
    files, left = [], PIECE
    (folder / "text").mkdir()
    with corpus.opened(config.text, limit=PIECE, text_field=config.text_field) as source:
        if source.missing:
            say(f"{source.missing}. Rehearsing on the help topics that Python carries instead")
        kind = "bpe" if source.missing and config.tokenizer == "auto" else config.tokenizer
        for number, file in enumerate(source.files):
            if left <= 0:
                break
            start = ""
            for piece in file.read():  # of a text, or the rows of a file
                start += piece + ("\n" if file.in_rows else "")
                if len(start) >= left:
                    break
            start = start[:left]
            left -= len(start)
            name = Path(file.label).name + (".txt" if file.in_rows else "")
            files.append(folder / "text" / f"{number:06d}-{name}")
            files[-1].write_text(start, encoding="utf-8", newline="")
    settings = (kind, config.vocab_size, config.val_fraction)
    prepare(tuple(map(str, files)), folder / "tokens", *settings, say=say, block_size=block_size, given=given)
    return folder / "tokens", left > 0


def _processes() -> dict[int, int]:
    """The parent of each process of this machine that has not ended, by their numbers."""
    if Path("/proc/self/stat").exists():  # Linux, where a small container has no ps
        listed = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended since
                state, parent = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:2]
                listed.append([path.parent.name, parent, state])
    else:
        command = ["ps", "-A", "-o", "pid=", "-o", "ppid=", "-o", "stat="]
        listed = [line.split() for line in subprocess.check_output(command, text=True).splitlines()]
    return {int(pid): int(parent) for pid, parent, state in listed if state[0] != "Z"}


def _children(pid: int) -> list[int]:
    """The processes that a process started, in the order of their start."""
    return sorted(child for child, parent in _processes().items() if parent == pid)


def _in_time(began: float, who: str) -> None:
    """Raises Failure for a job that hangs."""
    if time.monotonic() - began > LIMIT:
        raise Failure(f"{who} did not end in {LIMIT:.0f} s: something hangs, or this machine is very busy")
