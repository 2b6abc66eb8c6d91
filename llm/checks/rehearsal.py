"""A rehearsal under way: several processes, one killed for good, resumed in one, compared."""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from llm.checks import prove
from llm.checks.rehearse import PIECE, STEPS, TOLERANCES, _children, _in_time, _piece, _processes, differences, shrunk
from llm.config import TrainConfig, from_settings, write_toml
from llm.data import TokenData, open_data
from llm.errors import Failure, UserError
from llm.machine.device import DTYPES, choose_device, choose_dtype
from llm.machine.parallel import check_parallel
from llm.machine.world import ALONE, World
from llm.model import GPT
from llm.plan import arithmetic, text_size
from llm.start.init_from import check_tokens, starting_point
from llm.start.new_run import name_of
from llm.start.run_folder import Say, disk_needed
from llm.start.texts import open_text
from llm.storage import checkpoint
from llm.tokens.prepare import files_there
from llm.tokens.reuse import default_folder
from llm.tokens.saved_tokenizer import load_tokenizer
from llm.tokens.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Finding:
    """What came of one check: `good` is None for what the machines of the run have to be compared with."""

    name: str
    good: bool | None
    words: str


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
        self.config, self.small = (text_size.with_vocabulary(c, vocabulary) for c in (config, self.small))
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
            text = text_size.text_of(from_settings({"tokenizer": bytewise}, self.config))
            needed += arithmetic.disk(self.config, text.tokens)["token files"]
        out_dir = Path(self.config.out_dir).resolve()
        free = shutil.disk_usage(next(path for path in (out_dir, *out_dir.parents) if path.exists())).free
        words = f"{needed / 2**30:.2f} GiB for the states of {self.config.out_dir}"
        return self._enough(words + ("" if self.prepared else " and the token files"), needed, free)

    def memory(self) -> tuple[bool | None, str]:
        """What rank 0 holds in the memory of its host while a state of the real model is saved."""
        needed = arithmetic.PROCESS + arithmetic.COPIES * sum(arithmetic.parameters(self.config.model).values())
        return self._enough(
            f"{needed / 2**30:.2f} GiB on the host of rank 0 to save", needed, arithmetic.machine_memory()
        )

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
