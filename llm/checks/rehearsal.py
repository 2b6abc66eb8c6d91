"""Rehearse a cluster run on one machine: train in several processes, kill one, resume in one process, compare.

The settings are those of the run, with a small model. The processes, the checkpoints and the SIGKILL are real. The
settings of the real model are checked too, as far as that needs no cluster.
"""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch

from llm.checks import prove
from llm.checks.compare_runs import TOLERANCES, run_differences, update_size
from llm.checks.processes import check_time, children_of, running_processes
from llm.checks.shrink import PIECE, STEPS, prepare_first_piece, shrink_config
from llm.config import TrainConfig, from_settings, write_toml
from llm.data import TokenData, open_data
from llm.errors import Failure, UserError
from llm.machine.device import DTYPES, choose_device, choose_dtype
from llm.machine.parallel import check_parallel
from llm.machine.processors import cores
from llm.machine.world import ALONE, World
from llm.plan import arithmetic, text_size
from llm.prepare.prepare import files_there
from llm.prepare.reuse import default_folder
from llm.start.init_from import changed_settings, check_tokens
from llm.start.new_run import name_of
from llm.start.run_folder import Say, disk_needed
from llm.start.sources import open_sources
from llm.start.texts import open_text
from llm.storage import checkpoint
from llm.tokens.saved_tokenizer import load_tokenizer
from llm.tokens.tokenizer import Tokenizer

NOT_CHECKED = (
    "NCCL and GPUs, the network between machines, whether each machine sees the same files, "
    "the accelerator's memory and speed"
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check. `good` is None if the user has to compare it with the machines of the run."""

    name: str
    good: bool | None
    message: str


class Rehearsal:
    """The checks of `config` for `world_size` processes, rehearsed by `nproc` processes in `folder`.

    The caller removes `folder`. `is_here`: the run itself is meant for this machine: its disk and memory must suffice.

    Raises UserError if `init_from` or `teacher` names no usable weights.
    """

    def __init__(
        self,
        config: TrainConfig,
        nproc: int,
        world_size: int,
        is_here: bool,
        folder: Path,
        say: Say = lambda line: None,
        given: Collection[str] | None = None,
    ) -> None:
        sources = open_sources(config, say, changed_settings(config) if given is None else given)
        self.config = sources.config
        self.teachers = sources.teachers
        self.tokenizer = sources.tokenizer  # of init_from or of the teachers
        self.nproc = nproc
        self.world_size = world_size
        self.is_here = is_here
        self.folder = folder
        self.whole = folder / "whole"  # the uninterrupted run
        self.parts = folder / "parts"  # the run that is killed and resumed
        self.preset = folder / "small.toml"  # settings of both
        self.say = say
        self.small = shrink_config(self.config, nproc, world_size)
        self.is_prepared = False  # whether the run's own token files exist, and
        self.train_tokens = 0  # how many tokens to train on they have
        self.resumed_at = 0  # step
        threads = cores(share_of=nproc)  # also of one process, so that it sums in the same order
        self.environment = {"OMP_NUM_THREADS": str(threads), "TMPDIR": str(folder)}  # torchrun leaves folders in TMPDIR
        self.job: subprocess.Popen[str] | None = None
        self.workers: list[int] = []  # process ids of the job
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
        """Yield the result of each check. A check that raises ends the list, because the later ones need it."""
        try:
            for name, stage in self.stages.items():
                try:
                    yield Finding(name, *stage())
                except (UserError, Failure) as error:
                    yield Finding(name, False, str(error))
                    return
        finally:
            self._end_job()

    def split(self) -> tuple[bool, str]:
        """Check that the real settings can be split over the real number of processes."""
        config = self.config
        if self.world_size > 1 and config.device.startswith(("cuda:", "mps")):
            choose_device(config.device, 0)  # raises: that is one device
        check_parallel(config, World(size=self.world_size), DTYPES.get(config.dtype, torch.float32))
        share, micro_batches = config.share(self.world_size)
        sizes = f"{share} each of {self.world_size} processes, in {micro_batches} micro-batches"
        return True, f"{config.windows_per_step} windows a step: {sizes}"

    def text(self) -> tuple[bool, str]:
        """Check that the tokens fit the vocabulary and the window, and prepare the text of the small run."""
        config = self.config
        if "-" in config.text:
            raise UserError(
                "text = '-': a rehearsal reads the text more than once, standard input can be read once only; prepare "
                "token files first, with losscurve prepare -"
            )
        data, tokenizer, source = self._open_text()
        if config.init_from:
            check_tokens(config, data, self.tokenizer, tokenizer, config.init_from)
        if self.is_prepared and config.sample_prompt and tokenizer is not None:
            tokenizer.encode(config.sample_prompt)  # raises if the tokenizer cannot encode it
        vocabulary = config.model.vocab_size if config.init_from else config.vocab_size or data.vocab_size
        self.config = text_size.with_vocabulary(config, vocabulary)
        if self.teachers:
            check_tokens(self.config, data, self.teachers[0].tokenizer, tokenizer, config.teacher[0])
        self.small = text_size.with_vocabulary(self.small, vocabulary)
        self._write_preset(data)
        return True, (
            f"token ids are below {data.vocab_size:,}, the model's vocabulary is {vocabulary:,}; rehearsing on {source}"
        )

    def _open_text(self) -> tuple[TokenData, Tokenizer | None, str]:
        """Return the data and the tokenizer of the small run, and where they are from, in words."""
        config = self.config
        tokens = Path(config.data_dir or default_folder(config))
        self.is_prepared = bool(files_there(tokens))
        if self.is_prepared:
            data, tokenizer = open_text(config, self.say, None, self.tokenizer, ALONE)
            self.train_tokens = len(data.train)
            return data, tokenizer, str(tokens)
        small_block_size = self.small.model.block_size
        tokens, is_whole = prepare_first_piece(config, self.folder, self.tokenizer, small_block_size, self.say)
        data = open_data(tokens, small_block_size)
        tokenizer = load_tokenizer(tokens / "tokenizer.json")
        block_size = config.model.block_size
        if is_whole and len(data.train) <= block_size:
            raise UserError(
                f"{len(data.train)} tokens in the text, and a window of block_size = {block_size} needs one more than "
                "that; give more text or a smaller block_size"
            )
        part = "" if is_whole else f"'s first {PIECE:,} characters"
        return data, tokenizer, f"the text{part}, tokenized here"

    def _write_preset(self, data: TokenData) -> None:
        """Write the settings of the small run to `preset`, with "auto" resolved, so that every job has the same."""
        dtype = choose_dtype(self.small.dtype, torch.device("cpu"))
        resolved = {
            "text": (),
            "tokenizer": "auto",
            "data_dir": data.folder.resolve(),
            "dtype": name_of(dtype),
            "vocab_size": self.small.model.vocab_size,
            "out_dir": self.parts,
        }
        self.small = from_settings(resolved, self.small)
        self.preset.write_text(write_toml(self.small), encoding="utf-8")

    def disk(self) -> tuple[bool | None, str]:
        """Check the disk space for the checkpoints of the real model, and for its token files if they do not exist."""
        config = self.config
        tokens, token_files = self.train_tokens, 0
        purpose = f"the checkpoints of {config.out_dir}"
        if not self.is_prepared:
            # a character tokenizer would read the whole text, and hf is not to be had here
            tokenizer = "byte" if config.tokenizer in ("char", "hf") else config.tokenizer
            tokens = text_size.text_of(from_settings({"tokenizer": tokenizer}, config)).tokens
            token_files = arithmetic.disk(config, tokens)["token files"]
            purpose += " and the token files"
        needed = disk_needed(config, tokens) + token_files
        out_dir = Path(config.out_dir).resolve()
        existing = next(path for path in (out_dir, *out_dir.parents) if path.exists())
        message = f"{needed / 2**30:.2f} GiB for {purpose}"
        return self._judge_space(message, needed, shutil.disk_usage(existing).free)

    def memory(self) -> tuple[bool | None, str]:
        """Check the host memory that rank 0 needs while it saves a checkpoint of the real model."""
        needed = arithmetic.PROCESS_BYTES + arithmetic.bytes_copied_to_save(self.config)
        message = f"{needed / 2**30:.2f} GiB on the host of rank 0 to save"
        return self._judge_space(message, needed, arithmetic.machine_memory())

    def _judge_space(self, message: str, needed: int, available: int | None) -> tuple[bool | None, str]:
        if available is None:
            return None, f"{message}; this system does not report what it has"
        message = f"{message}; {available / 2**30:.2f} here"
        if needed <= available:
            return True, message
        if self.is_here:
            return False, f"{message}; make room or train a smaller model (for other machines: give --world_size)"
        return None, f"{message}, so check that the machine of rank 0 has it"

    def train(self) -> tuple[bool, str]:
        """Train in several processes until a checkpoint is on the disk."""
        began = time.monotonic()
        self.job = prove.start(["--nproc", str(self.nproc), "--preset", str(self.preset)], self.environment)
        while not self._saved_step():
            if self.job.poll() is not None and not self._saved_step():
                prove.finish(self.job)
                raise Failure("the run ended without saving a checkpoint")
            check_time(began, f"{self.nproc} processes")
            time.sleep(0.002)
        return True, f"{self.nproc} processes ({self.config.parallel}) trained and saved step {self._saved_step()}"

    def _saved_step(self) -> int:
        """Return the newest step that the run in `parts` saved; 0 if there is none after the start."""
        return max(checkpoint.saved_steps(self.parts), default=0)

    def kill(self) -> tuple[bool, str]:
        """Send SIGKILL to the last process; check that the others end and that the checkpoint is complete."""
        assert self.job is not None
        self.workers = children_of(self.job.pid)
        if len(self.workers) != self.nproc:
            raise Failure("the run was over before it could be killed; rehearse again")
        with contextlib.suppress(ProcessLookupError):  # it ended just now; the checkpoint shows whether too early
            os.kill(self.workers[-1], signal.SIGKILL)
        began = time.monotonic()
        while self.job.poll() is None or running_processes().keys() & set(self.workers):
            check_time(began, "after one process was killed, the others")
            time.sleep(0.1)
        self.job.communicate()
        took = time.monotonic() - began
        _, facts, damaged = checkpoint.newest_state(self.parts)
        if damaged:
            raise Failure(f"a checkpoint is damaged: {next(iter(damaged.values()))}")
        if facts["step"] == STEPS:
            raise Failure("the run was over before it could be killed; rehearse again")
        if self.job.returncode == 0:
            raise Failure("one of its processes was killed, but the run ended with exit code 0")
        self.job = None
        self.workers = []
        self.resumed_at = facts["step"]
        return True, f"one process killed by SIGKILL: the others ended in {took:.0f} s; step {self.resumed_at} is whole"

    def resume(self) -> tuple[bool, str]:
        """Resume in one process and train to the end."""
        self._train_alone(["--out_dir", str(self.parts), "--resume"])
        return True, f"one process resumed at step {self.resumed_at} and trained to step {self._saved_step()}"

    def compare(self) -> tuple[bool, str]:
        """Train an uninterrupted run in one process, and compare the resumed run with it."""
        self._train_alone(["--preset", str(self.preset), "--out_dir", str(self.whole)])
        loss, weight = run_differences(self.whole, self.parts)
        weight /= update_size(self.small)
        allowed_loss, allowed_weight = TOLERANCES[self.small.dtype]
        message = (
            f"losses within {loss:.1e} nats of an uninterrupted run in one process (allowed {allowed_loss:g}), weights "
            f"{weight:.1e} of an update apart ({allowed_weight:g}), in {self.small.dtype}"
        )
        if loss <= allowed_loss and weight <= allowed_weight:  # false for NaN
            return True, message
        return False, f"NOT the same run: {message}; report this, and train in one process until it is fixed"

    def _train_alone(self, flags: list[str]) -> None:
        """Train in one process. Raises Failure if it fails or hangs."""
        began = time.monotonic()
        self.job = prove.start(flags, self.environment)
        while self.job.poll() is None:
            check_time(began, "one process")
            time.sleep(0.02)
        prove.finish(self.job)
        self.job = None

    def _end_job(self) -> None:
        """Kill the job and its processes, which would otherwise outlive this process."""
        if self.job is None:
            return
        running = running_processes().keys() & set(self.workers)
        if self.job.poll() is None:
            running |= {self.job.pid, *children_of(self.job.pid)}
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.job.wait()
        if self.job.stderr:
            self.job.stderr.close()
