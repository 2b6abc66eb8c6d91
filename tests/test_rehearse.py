"""A rehearsal keeps what can break, passes if a run works on a cluster, and names the check that fails otherwise."""

import gzip
import os
import shlex
import subprocess
import time
from pathlib import Path

import pytest
from conftest import SMALL, flags, with_small

from llm import data
from llm.checks import processes, prove
from llm.checks import rehearsal as module
from llm.checks.compare_runs import run_differences
from llm.checks.rehearsal import Rehearsal
from llm.checks.shrink import STEPS, describe_changes, prepare_first_piece, shrink_config
from llm.config import PRESETS, from_settings, read_toml, to_settings
from llm.config.counts import count_parameters
from llm.errors import Failure
from llm.machine import world
from llm.machine.world import World
from llm.plan import arithmetic
from llm.start.new_run import new_run
from llm.train import train
from llm.training.events import Step
from llm.weights import run_config

ROOT = Path(__file__).parent.parent
TORTURE = bool(os.environ.get("LOSSCURVE_TORTURE"))
KEPT = (
    *("parallel", "activation_checkpointing", "cpu_offload", "dtype", "dropout", "n_head", "bias", "tied_lm_head"),
    *("gelu", "ffn_mult", "vocab_size", "text", "tokenizer", "val_fraction", "schedule", "max_lr", "grad_clip"),
    *("weight_decay", "weight_decay_split", "beta1", "beta2", "seed", "order"),
)


@pytest.fixture(autouse=True)
def jobs_find_the_package_and_their_temporary_folder(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("temporary")))


def left_over() -> list[Path]:
    import tempfile

    # torch keeps a torchinductor_… there, as everywhere
    return [path for path in Path(tempfile.gettempdir()).iterdir() if not path.name.startswith("torchinductor_")]


def rehearsal(here: Path, nproc: int = 2, world_size: int = 2, is_here: bool = True, **settings: object) -> Rehearsal:
    config = from_settings(SMALL | {"text": str(here / "text.txt")} | settings)
    (here / "rehearsal").mkdir()
    return Rehearsal(config, nproc, world_size, is_here, here / "rehearsal")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_what_can_break_is_kept_and_the_rest_is_small_for_every_preset(preset, parallel):
    more = {"parallel": parallel, "activation_checkpointing": True, "schedule": "linear", "dropout": 0.3}
    config = from_settings(read_toml(preset) | more)
    small = shrink_config(config, 2, 8)
    before, after = to_settings(config), to_settings(small)
    assert {name: before.get(name) for name in KEPT} == {name: after.get(name) for name in KEPT}
    assert small.final_lr == config.final_lr
    assert 0 < small.warmup < STEPS
    assert arithmetic.run_flops(small) < 3e11  # a second or two of one core
    assert count_parameters(small.model) < 7e6
    assert (small.device, small.compile, small.max_time, small.patience) == ("cpu", False, None, None)


def test_no_warm_up_stays_none_and_a_long_one_stays_long():
    assert shrink_config(from_settings({"warmup_steps": 0}), 2, 2).warmup == 0
    assert shrink_config(from_settings({"warmup_steps": 2500}), 2, 2).warmup == STEPS / 2
    assert shrink_config(from_settings({"warmup_steps": 4999}), 2, 2).warmup == STEPS - 1


@pytest.mark.parametrize(("heads", "width"), [(1, 64), (4, 128), (12, 768), (96, 12288), (3, 3)])
def test_the_heads_stay_and_divide_the_smaller_width(heads, width):
    model = shrink_config(from_settings({"n_head": heads, "n_embd": width}), 2, 2).model
    assert model.n_head == heads
    assert model.n_embd <= min(width, max(64, heads))


def micro_batches_of(config, processes):
    """Return (has several micro-batches, the last one is smaller) of each process, as llm.train splits them."""
    share, rest = divmod(config.windows_per_step, processes)
    assert rest == 0
    sizes = [min(config.batch_size, share - first) for first in range(0, share, config.batch_size)]
    return len(sizes) > 1, sizes[-1] < config.batch_size


@pytest.mark.parametrize("nproc", [2, 3, 4, 9])
@pytest.mark.parametrize(
    ("batch", "micro_batches", "world_size", "kind"),
    [(32, 1, 8, (False, True)), (4, 8, 8, (False, False)), (12, 40, 8, (True, False)), (4, 3, 2, (True, True))],
)
def test_a_process_accumulates_as_in_the_run_itself(nproc, batch, micro_batches, world_size, kind):
    config = from_settings({"batch_size": batch, "gradient_accumulation_steps": micro_batches})
    small = shrink_config(config, nproc, world_size)
    assert micro_batches_of(config, world_size) == micro_batches_of(small, nproc) == kind
    assert small.windows_per_step <= 12 * nproc


def test_every_changed_setting_is_listed():
    config = from_settings(read_toml("gpt2-124m") | {"patience": 3})
    lines = describe_changes(config, shrink_config(config, 2, 2))
    assert {"n_layer 12 -> 2", "n_embd 768 -> 60", "block_size 1024 -> 32", "patience 3 -> none"} <= set(lines)
    assert not [line for line in lines if line.startswith(("out_dir", "parallel", "dtype", "max_lr"))]


def test_the_piece_of_a_compressed_text_is_prepared(here):
    Path("text.txt.gz").write_bytes(gzip.compress(Path("text.txt").read_bytes()))
    config = from_settings({"text": "text.txt.gz", "tokenizer": "char"})
    tokens, is_whole = prepare_first_piece(config, here, None, 16, lambda line: None)
    assert is_whole
    assert sum(len(split) for split in tokens_of(tokens)) == len(Path("text.txt").read_text())


def tokens_of(folder):
    found = data.open_data(folder, 16)
    return found.train, found.val


def test_a_run_that_works_passes_and_leaves_nothing(here, losscurve):
    settings = {"dropout": 0.2, "batch_size": 4, "gradient_accumulation_steps": 3, "grad_clip": 1.0}
    code, out, err = losscurve(f"rehearse --text text.txt {flags(**settings)}")
    assert code == 0, out + err
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[2:10]] == ["ok"] * 8, out
    assert "batch_size 4 -> 2" in lines[1]
    assert "2 processes (ddp) trained and saved step 4" in out
    assert "one process resumed at step" in out
    assert "in float32" in lines[9]
    assert lines[10].startswith("not checked: NCCL")
    assert lines[11].startswith("the run of 2 processes with ddp will work (")
    assert sorted(path.name for path in here.iterdir()) == ["text.txt"]
    assert not left_over()


@pytest.mark.skipif(not TORTURE, reason="one kind is enough: in make torture")
def test_fsdp_passes_too_on_existing_token_files(here, losscurve):
    assert losscurve("prepare text.txt --tokenizer char")[0] == 0
    more = "--parallel fsdp --cpu_offload --activation_checkpointing --tied_lm_head --data_dir data"
    code, out, err = losscurve(f"rehearse {more} {flags(batch_size=8)} --world_size 4 --keep_folder")
    assert code == 0, out + err
    assert "8 windows a step: 2 each of 4 processes, in 1 micro-batches" in out
    assert "rehearsing on data" in out
    assert "2 processes (fsdp) trained and saved" in out
    assert "the run of 4 processes with fsdp will work" in out
    (folder,) = left_over()
    assert f"folder kept: {folder}" in out
    assert 'parallel = "fsdp"' in (folder / "small.toml").read_text()
    assert not Path("checkpoints").exists()


@pytest.mark.skipif(not TORTURE, reason="takes a whole rehearsal: in make torture")
def test_a_resume_that_forgets_the_optimizer_fails_in_one_line(here, losscurve, monkeypatch):
    """The fault is in the processes of the rehearsal: Python runs a sitecustomize.py before anything else."""
    (here / "broken").mkdir()
    (here / "broken" / "sitecustomize.py").write_text(
        "import sys\n"
        "if '--resume' in sys.orig_argv:\n"
        "    import llm.training.state\n"
        "    llm.training.state.restore_optimizer = lambda *_: None\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here / "broken"), str(ROOT)]))
    code, out, _ = losscurve(f"rehearse --text text.txt {flags()}")
    assert code == 1
    (failed,) = [line for line in out.splitlines() if line.startswith("FAILED")]
    assert "same run" in failed
    assert "NOT the same run: losses within" in failed
    assert "will NOT work as it is: fix same run" in out
    assert not left_over()


def ran(rehearsing: Rehearsal, folder: str) -> Path:
    """Train the small run in this process."""
    config = from_settings({"out_dir": rehearsal_folder(rehearsing, folder)}, rehearsing.small)
    with new_run(config) as run:
        assert sum(isinstance(event, Step) for event in train(run)) == STEPS
    return Path(config.out_dir)


def rehearsal_folder(rehearsing: Rehearsal, name: str) -> str:
    return str(rehearsing.folder / name)


WRONG = {
    "windows of another process": lambda patch: patch.setattr(
        World, "rows", lambda self, count: slice(count // 2, count)
    ),
    "another batch": lambda patch: patch.setattr(
        "llm.training.parts.batch_at",
        lambda tokens, seed, step, *more: data.batch_at(tokens, seed, max(step, 1), *more),
    ),
    "no clipping": lambda patch: patch.setattr("torch.nn.utils.clip_grads_with_norm_", lambda *_: None),
    "another learning rate": lambda patch: [
        patch.setattr(f"{name}.lr_at", lambda step, config: 1.01 * config.max_lr)
        for name in ("llm.train", "llm.training.recording")
    ],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"] if TORTURE else ["bfloat16"])
@pytest.mark.parametrize("wrong", WRONG)
def test_another_batch_rate_or_gradient_is_not_the_same_run(here, monkeypatch, dtype, wrong):
    rehearsing = rehearsal(here, dtype=dtype, grad_clip=0.1)
    rehearsing.text()
    rehearsing.whole = ran(rehearsing, "whole")
    with monkeypatch.context() as patch:
        WRONG[wrong](patch)
        rehearsing.parts = ran(rehearsing, "parts")
    monkeypatch.setattr(Rehearsal, "_train_alone", lambda self, words: None)
    if wrong == "another learning rate":  # the record shows it
        with pytest.raises(Failure, match="the column lr of"):
            rehearsing.compare()
        return
    good, words = rehearsing.compare()
    assert good is False
    assert words.startswith("NOT the same run: losses within")
    rehearsing.parts = rehearsing.whole
    assert rehearsing.compare()[0] is True
    assert run_differences(rehearsing.whole, rehearsing.whole) == (0.0, 0.0)


def test_a_run_with_muon_and_an_average_is_compared_in_float32_and_in_its_own_updates(here, monkeypatch):
    muon = {"optimizer": "muon", "muon_lr": 0.08, "ema": 0.9, "arch": "llama", "dtype": "bfloat16"}
    rehearsing = rehearsal(here, max_lr=0.01, **muon)
    rehearsing.text()
    assert rehearsing.small.dtype == "float32"
    assert any("dtype bfloat16 -> float32" in line for line in describe_changes(rehearsing.config, rehearsing.small))
    rehearsing.whole = ran(rehearsing, "whole")
    rehearsing.preset = here / "small.toml"
    monkeypatch.setattr(Rehearsal, "_train_alone", lambda self, words: None)
    with monkeypatch.context() as patch:
        patch.setattr("llm.training.averaging.Average.update", lambda self, accepted: None)
        rehearsing.parts = ran(rehearsing, "parts")
    good, words = rehearsing.compare()
    assert good is False
    assert "weights 0.0e+00 of an update" in words  # only the loss of the average differs
    monkeypatch.setattr(module, "run_differences", lambda whole, parts: (0.0, 1.9e-4))
    assert rehearsing.small.model.n_embd == 16
    assert "weights 9.5e-03 of an update" in rehearsing.compare()[1]  # of 0.08 / 4


@pytest.mark.parametrize(
    ("dtype", "loss", "weight", "good"),
    [
        ("float32", 9e-5, 9e-3, True),
        ("float32", 2e-4, 0.0, False),
        ("float32", 0.0, 2e-2, False),
        ("float32", float("nan"), 0.0, False),
        ("bfloat16", 9e-3, 0.09, True),
        ("bfloat16", 2e-2, 0.0, False),
        ("bfloat16", 0.0, 0.2, False),
    ],
)
def test_losses_and_weights_must_each_be_within_their_tolerance(here, monkeypatch, dtype, loss, weight, good):
    rehearsing = rehearsal(here, dtype=dtype, max_lr=0.02)
    rehearsing.preset = here / "small.toml"
    monkeypatch.setattr(Rehearsal, "_train_alone", lambda self, words: None)
    monkeypatch.setattr(module, "run_differences", lambda whole, parts: (loss, weight * 0.02))
    assert rehearsing.compare()[0] is good


def test_windows_that_do_not_divide_are_found_before_anything_runs(here, losscurve):
    code, out, _ = losscurve(f"rehearse --text text.txt {flags()} --world_size 64")
    assert code == 1
    assert "FAILED  processes  batch_size x gradient_accumulation_steps = 4 windows do not divide among 64" in out
    assert "not reached: text, disk, memory, training, a kill, resuming, same run" in out
    assert "the run of 64 processes with ddp will NOT work as it is: fix processes" in out


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("--tokenizer byte --vocab_size 20", "vocab_size = 20 is below the 257 of byte"),
        ("--block_size 10000", "a window of block_size = 10000 needs one more"),
        ("--text missing.txt", "missing.txt: there is no such file"),
        ("--text empty.txt", "empty.txt: the text is empty"),
        ("--text -", "text = '-': a rehearsal reads the text more than once"),
        ("--data_dir nowhere", "data_dir = nowhere: no train.bin there"),
        ("--parallel fsdp --compile", "compile: does not work with --parallel fsdp"),
        ("--device cuda:1", "device = 'cuda:1': is one device"),
        ("--cpu_offload", "cpu_offload: works with --parallel fsdp only"),
    ],
)
def test_settings_that_the_run_would_refuse_are_found_first(here, losscurve, settings, words):
    Path("empty.txt").touch()
    before = sorted(here.iterdir())
    text = "" if "--text" in settings or "--data_dir" in settings else "--text text.txt"
    code, out, _ = losscurve(f"rehearse {with_small(settings)} {text}")
    assert code == 1
    (failed,) = [line for line in out.splitlines() if line.startswith("FAILED")]
    assert words in failed
    assert "not reached" in out
    assert sorted(here.iterdir()) == before
    assert not left_over()


def test_token_files_are_checked_against_the_real_settings(here, losscurve):
    losscurve("prepare text.txt --tokenizer char")
    code, out, _ = losscurve(f"rehearse --data_dir data {flags()} --vocab_size 5")
    assert code == 1
    assert "FAILED  text       vocab_size = 5 is below the" in out


def test_disk_and_memory_are_those_of_the_real_model(here, monkeypatch):
    large = {"n_layer": 100, "n_head": 16, "n_embd": 2048}
    rehearsing = rehearsal(here, **large)
    rehearsing.text()
    count = count_parameters(rehearsing.config.model)
    assert count > 5e9
    monkeypatch.setattr(arithmetic, "machine_memory", lambda: 17 * count)
    needed = f"{(16 * count + arithmetic.PROCESS_BYTES) / 2**30:.2f} GiB on the host of rank 0 to save"
    assert rehearsing.memory() == (True, f"{needed}; {17 * count / 2**30:.2f} here")
    monkeypatch.setattr(arithmetic, "machine_memory", lambda: 15 * count)
    assert rehearsing.memory()[0] is False
    for free, good in ((61 * count, True), (59 * count, False)):  # three kept, two being written, the weights
        monkeypatch.setattr(module.shutil, "disk_usage", lambda path, free=free: SimpleUsage(free))
        assert rehearsing.disk()[0] is good
    rehearsing.is_here = False  # then the cluster needs the space
    good, words = rehearsing.disk()
    assert good is None
    assert "so check that the machine of rank 0 has it" in words


class SimpleUsage:
    def __init__(self, free: int) -> None:
        self.free = free


def fake_job(monkeypatch, rehearsing: Rehearsal, script: str, limit: float = 5.0) -> None:
    """Replace the job of several processes with a shell script, and its time limit with `limit` seconds.

    A script makes the folder of a checkpoint in its second process: a third one, while it lasts, would be one too many.
    """
    monkeypatch.setattr(processes, "TIME_LIMIT", limit)
    monkeypatch.setattr(
        prove,
        "start",
        lambda words, environment: subprocess.Popen(
            ["bash", "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ),
    )


NAP = f"sleep 70.{os.getpid()}"  # no other process has this name


def naps_end() -> bool:
    """Return whether all sleeping processes end soon."""
    for _ in range(100):
        listed = subprocess.run(["ps", "-A", "-o", "args="], capture_output=True, text=True, check=True)
        if not any(line.endswith(NAP) for line in listed.stdout.splitlines()):
            return True
        time.sleep(0.05)
    return False


def test_a_failed_job_has_its_error_message(here, monkeypatch):
    rehearsing = rehearsal(here)
    fake_job(monkeypatch, rehearsing, "echo 'error: it cannot work' >&2; echo torchrun: failed >&2; exit 1")
    finding = list(rehearsing.findings())[-1]
    assert (finding.name, finding.good) == ("training", False)
    assert finding.message == "a training run failed: error: it cannot work"


def test_a_job_that_saves_nothing_or_hangs_is_killed(here, monkeypatch):
    rehearsing = rehearsal(here)
    fake_job(monkeypatch, rehearsing, "sleep 100 & sleep 100", limit=0.5)
    findings = list(rehearsing.findings())
    assert [f.good for f in findings[:4]] == [True] * 4
    assert findings[-1].name == "training"
    assert "2 processes did not end in 0 s: something hangs" in findings[-1].message
    assert rehearsing.job.poll() is not None


def test_processes_that_outlive_a_kill_are_found_and_killed(here, monkeypatch):
    rehearsing = rehearsal(here)
    folder = shlex.quote(str(rehearsing.parts / "step-000004"))
    fake_job(monkeypatch, rehearsing, f"{NAP} & (mkdir -p {folder}; exec {NAP}) & wait", limit=2.0)
    findings = list(rehearsing.findings())
    assert findings[-1].name == "a kill"
    assert "after one process was killed, the others did not end" in findings[-1].message
    assert rehearsing.job.poll() is not None
    assert naps_end()


def test_a_process_that_outlives_its_launcher_is_found_and_killed(here, monkeypatch):
    rehearsing = rehearsal(here)
    folder = shlex.quote(str(rehearsing.parts / "step-000004"))
    fake_job(monkeypatch, rehearsing, f"{NAP} & (mkdir -p {folder}; exec {NAP}) & wait $!; exit 1", limit=2.0)
    assert "the others did not end" in list(rehearsing.findings())[-1].message
    assert naps_end()


def test_an_incomplete_checkpoint_after_the_kill_is_reported(here, monkeypatch):
    rehearsing = rehearsal(here)
    folder = shlex.quote(str(rehearsing.parts / "step-000004"))
    ends = "wait $!; kill $first; exit 1"  # once the second of them is killed
    fake_job(monkeypatch, rehearsing, f"sleep 100 & first=$!; (mkdir -p {folder}; exec sleep 100) & {ends}")
    finding = list(rehearsing.findings())[-1]
    assert (finding.name, finding.good) == ("a kill", False)
    assert "no checkpoint to resume from" in finding.message
    assert "manifest.json" in finding.message


@pytest.mark.parametrize(
    ("step", "code", "words"),
    [(4, 0, "the run ended with exit code 0"), (STEPS, 1, "over before it could be killed")],
)
def test_a_kill_without_effect_fails(here, monkeypatch, step, code, words):
    rehearsing = rehearsal(here)
    monkeypatch.setattr(module.checkpoint, "newest_state", lambda folder: ({}, {"step": step}, {}))
    folder = shlex.quote(str(rehearsing.parts / "step-000004"))
    ends = f"wait $!; kill $first; exit {code}"
    fake_job(monkeypatch, rehearsing, f"sleep 100 & first=$!; (mkdir -p {folder}; exec sleep 100) & {ends}")
    assert words in list(rehearsing.findings())[-1].message


@pytest.mark.parametrize("last", ["exit 0", "sleep 0.2"])
def test_a_run_that_ends_before_the_kill_is_reported(here, monkeypatch, last):
    rehearsing = rehearsal(here)
    fake_job(monkeypatch, rehearsing, f"mkdir -p {shlex.quote(str(rehearsing.parts / 'step-000004'))}; {last}")
    finding = list(rehearsing.findings())[-1]
    assert (finding.name, finding.good) == ("a kill", False)
    assert "over before it could be killed" in finding.message


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("--nproc 1", "nproc = 1: expected a number of processes from 2 to 64"),
        ("--nproc many", "argument --nproc: invalid int value"),
        ("--world_size 0", "world_size = 0: expected a number of processes from 1"),
        ("--world_sizes 2", "unknown argument --world_sizes; did you mean --world_size?"),
        ("--n_layer 0", "n_layer = 0: expected a whole number at least 1"),
        ("--init_from nowhere", "nowhere: no such file or folder"),
    ],
)
def test_a_wrong_flag_is_an_error_of_one_line(here, losscurve, mistake, words):
    code, out, err = losscurve(f"rehearse {mistake}")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert words in err
    assert not left_over()


def test_below_torchrun_it_is_refused(here, losscurve, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    code, _, err = losscurve("rehearse")
    assert code == 2
    assert "RANK is set" in err


def test_init_from_decides_the_settings_only(here, losscurve):
    assert losscurve(f"train --text text.txt --data_dir data {flags(max_steps=3, eval_every=3)} --out_dir old")[0] == 0
    config = from_settings({"init_from": "old", "text": str(here / "text.txt"), "batch_size": 4})
    (here / "rehearsal").mkdir()
    rehearsing = Rehearsal(config, 2, 2, True, here / "rehearsal")
    assert rehearsing.config.model.n_layer == 2
    assert rehearsing.small.init_from is None
    assert rehearsing.text()[0] is True
    assert rehearsing.small.model.vocab_size == rehearsing.config.model.vocab_size
    assert world.ALONE.size == 1
    assert run_config(Path("old")).model == rehearsing.config.model
