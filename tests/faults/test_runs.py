"""Whole runs under kills, a full disk and signals; LOSSCURVE_TORTURE=1 (make torture) does more of each."""

import contextlib
import errno
import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import SMALL, flags

import llm.model
import llm.train
import llm.training.evaluating
import llm.training.parts
import llm.training.saving
import llm.training.state
from llm import storage
from llm.checks.prove import fingerprint
from llm.config import from_settings
from llm.record.metrics import read_record
from llm.record.samples import Samples
from llm.start.new_run import new_run
from llm.start.resume_run import resume_run
from llm.storage import checkpoint, files
from llm.storage.locks import in_use
from llm.train import train
from llm.training.events import Notice, Saved, Step

UNSAVED = "the checkpoint could not be saved ("  # for its own files or its record, whichever meets the full disk first
TORTURE = bool(os.environ.get("LOSSCURVE_TORTURE"))
KINDS = {
    "dropout": {"dropout": 0.2, "gradient_accumulation_steps": 2, "batch_size": 2, "grad_clip": 1.0},
    "plain": {},
    "float16": {"dtype": "float16"},
    "bfloat16-tied": {"dtype": "bfloat16", "tied_lm_head": True, "weight_decay_split": True},
}


@pytest.fixture(autouse=True)
def other_processes_find_the_package(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(llm.__file__).parent.parent))


def config_for(here, out_dir, **settings):
    small = SMALL | {"text": str(here / "text.txt"), "data_dir": str(here / "data"), "save_every": 3}
    return from_settings(small | settings | {"out_dir": out_dir})


def until(training, step):
    """Iterate up to a step and leave the run there, as a crash would: nothing more is saved."""
    for event in train(training):
        if isinstance(event, Step) and event.step == step:
            return


@pytest.fixture
def ledger(monkeypatch):
    """The batches taken, by step: what they were each time."""
    seen: dict[int, list[bytes]] = {}
    plain = llm.training.parts.batch_at

    def batch_at(tokens, seed, step, *sizes):
        batch = plain(tokens, seed, step, *sizes)
        seen.setdefault(step, []).append(batch.x.tobytes() + batch.y.tobytes() + batch.seeds.tobytes())
        return batch

    monkeypatch.setattr(llm.training.parts, "batch_at", batch_at)
    return seen


@pytest.mark.parametrize("kind", KINDS if TORTURE else ["dropout"])
def test_stopped_at_any_step_and_resumed_it_is_the_same_run(here, kind, ledger, record_property):
    settings = KINDS[kind]
    with new_run(config_for(here, "whole", **settings)) as run:
        list(train(run))
    expected, whole = fingerprint(Path("whole")), {step: set(batches) for step, batches in ledger.items()}
    assert sorted(whole) == list(range(12))
    stops = range(1, 12) if TORTURE else (1, 3, 4, 5, 8, 11)  # saved at 0, 4, 8 and 12
    for step in stops:
        ledger.clear()
        with new_run(config_for(here, "parts", **settings), overwrite=True) as run:
            until(run, step)
        with resume_run(Path("parts"), {}) as run:
            assert run.progress.step <= step
            list(train(run))
        assert fingerprint(Path("parts")) == expected, f"stopped at step {step}"
        assert {step: set(batches) for step, batches in ledger.items()} == whole
    record_property("stopped and resumed", len(stops))


MUTANTS = {
    "another batch": lambda patch: patch.setattr(
        llm.training.parts,
        "batch_at",
        lambda tokens, seed, step, *n, plain=llm.training.parts.batch_at: plain(tokens, seed, step + 1, *n),
    ),
    "one batch again": lambda patch: patch.setattr(
        llm.training.parts,
        "batch_at",
        lambda tokens, seed, step, *n, plain=llm.training.parts.batch_at: plain(
            tokens, seed, 6 if step == 7 else step, *n
        ),
    ),
    "another draw of dropout": lambda patch: patch.setattr(
        llm.model.Dropout,
        "__init__",
        lambda self, p, seeds, plain=llm.model.Dropout.__init__: plain(self, p, seeds + 1),
    ),
    "another learning rate": lambda patch: patch.setattr(
        llm.train, "lr_at", lambda step, config, plain=llm.train.lr_at: plain(step + 1, config)
    ),
    "moments forgotten": lambda patch: patch.setattr(llm.training.state, "restore_optimizer", lambda *_: None),
    "losses forgotten": lambda patch: patch.setattr(
        llm.training.state,
        "Progress",
        lambda plain=llm.training.state.Progress, **facts: plain(**facts | {"losses": []}),
    ),
    "tokens forgotten": lambda patch: patch.setattr(
        llm.training.state,
        "Progress",
        lambda plain=llm.training.state.Progress, **facts: plain(**facts | {"tokens": 0}),
    ),
    "samples forgotten": lambda patch: patch.setattr(
        Samples, "cut", lambda self, step, plain=Samples.cut: plain(self, -1)
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_resume_that_is_not_exact_is_noticed(here, monkeypatch, mutant, record_property):
    """The comparison above is worth something: each of these changes after the resume shows in it."""
    settings = KINDS["dropout"] | {"save_every": 5, "log_every": 2}
    with new_run(config_for(here, "whole", **settings)) as run:
        list(train(run))
    with new_run(config_for(here, "parts", **settings)) as run:
        until(run, 7)
    with monkeypatch.context() as patch:
        MUTANTS[mutant](patch)
        with resume_run(Path("parts"), {}) as run:
            assert run.progress.step == 5
            list(train(run))
    assert fingerprint(Path("parts")) != fingerprint(Path("whole"))
    record_property("mutants of a resume caught", 1)


@pytest.mark.skipif(not TORTURE, reason="tests/test_readme.py runs the same command; every kind: in make torture")
@pytest.mark.parametrize("kind", [*KINDS, "compiled"])
def test_killed_at_random_moments_for_good(here, losscurve, kind, record_property):
    """SIGKILL to real processes, one after the other."""
    kills = 5
    settings = (KINDS | {"compiled": {"compile": True, "dropout": 0.2}})[kind] | {
        "max_steps": 120,
        "eval_every": 30,
        "save_every": 4,
        "out_dir": "proof",
        "text": "text.txt",
    }
    code, out, err = losscurve(f"prove-resume --kills {kills} {flags(**settings)}")
    assert code == 0, out + err
    hits = sum(line.startswith("killed after step") for line in out.splitlines())
    assert hits >= kills - 2
    assert f"{hits} kills: bit for bit" in out
    record_property("real kills of training", hits)


def test_preparing_survives_kills(here, start, record_property):
    text = (here / "text.txt").read_text() * 12000
    (here / "long.txt").write_text(text)
    generator = random.Random(1)
    kills = 0
    for _ in range(12 if TORTURE else 3):
        process = start("prepare long.txt --data_dir data --tokenizer byte --overwrite")
        time.sleep(generator.uniform(0.2, 0.7))
        kills += process.poll() is None
        process.kill()
        process.communicate()
    process = start("prepare long.txt --data_dir data --tokenizer byte --overwrite")
    out, err = process.communicate()
    assert process.returncode == 0, err
    process = start("verify data")
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    assert not [path for path in Path("data").iterdir() if ".tmp-" in path.name or path.name.startswith(".prepar")]
    record_property("real kills of preparing", kills)


PHASES = {  # the module that calls it, by name
    "evaluate": llm.training.evaluating,
    "draw_sample": llm.training.evaluating,
    "plot_runs": llm.training.evaluating,
    "write_state": llm.training.saving,
    "read_losses": llm.train,
}


@pytest.mark.parametrize("phase", PHASES)
def test_sigterm_in_any_phase_saves(here, monkeypatch, losscurve, phase, record_property):
    owner, calls = PHASES[phase], []
    plain = getattr(owner, phase)

    def signalled(*args, **kwargs):
        calls.append(phase)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, phase, signalled)
        patch.setattr(llm.training.evaluating, "PICTURE_PACE", 0)  # a picture at every evaluation
        code, out, _ = losscurve(f"train {flags(text='text.txt', max_steps=400)}")
    assert code == 143
    saved = int(out.split("saved step ")[1].split()[0])
    assert checkpoint.newest_state(Path("checkpoints"))[1]["step"] == saved
    code, _, _ = losscurve(f"train --resume --max_steps {saved + 2}")
    assert code == 0
    record_property("SIGTERM by phase", 1)


TIMES = [(1.0, {}), (2.5, {})]  # seconds after the start, with which settings
MORE_TIMES = [(0.3, {}), (1.6, {}), (2.2, {}), (3.5, {}), *((delay, {"compile": True}) for delay in (3.0, 5.0, 8.0))]


@pytest.mark.parametrize(("delay", "more"), TIMES + MORE_TIMES if TORTURE else TIMES)
def test_sigterm_at_any_time_leaves_a_run_that_can_go_on(here, losscurve, start, delay, more, record_property):
    process = start(f"train {flags(text='text.txt', max_steps=100000, **more)}")
    time.sleep(delay)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode in (143, -signal.SIGTERM), err
    assert "Traceback" not in err
    states = checkpoint.saved_steps(Path("checkpoints"))
    if process.returncode == 143:
        assert f"saved step {states[-1]}" in out
    if states:
        code, _, err = losscurve(f"train --resume --max_steps {states[-1] + 3}")
    else:
        code, _, err = losscurve(f"train --overwrite {flags(text='text.txt')}")
    assert code == 0, err
    record_property("SIGTERM by time", 1)


def test_a_second_signal_leaves_at_once_with_the_last_state(here, start):
    process = start(f"train {flags(text='text.txt', max_steps=10**6, eval_every=10**6, save_every=20)}")
    while len(checkpoint.saved_steps(Path("checkpoints"))) < 2:
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode in (130, 143)
    assert checkpoint.newest_state(Path("checkpoints"))[2] == {}


def test_a_disk_that_is_full_for_a_while_costs_nothing(here, record_property):
    """A real limit of the system on the size of files: what is there stays, training goes on, saving is tried again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    said, saved, states = [], [], {}
    with new_run(config_for(here, "whole")) as run:
        list(train(run))
    try:
        with new_run(config_for(here, "full")) as run:
            for event in train(run):
                if isinstance(event, Saved) and event.step > 0 and not states:  # so nothing is being written
                    states = {path: path.read_bytes() for path in Path("full").rglob("*") if path.is_file()}
                    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
                if isinstance(event, Step) and event.step == 8:
                    for path in Path("full").glob("step-*"):
                        checkpoint.load_state(path)
                    assert Path("full/model.pt").read_bytes() == states[Path("full/model.pt")]
                if isinstance(event, Step) and event.step == 10:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
                said += [event.text for event in [event] if isinstance(event, Notice)]
                saved += [event.step for event in [event] if isinstance(event, Saved)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert run.unsaved is None
    assert run.failed_saves >= 1
    assert sum(line.startswith(UNSAVED) for line in said) == 1
    assert saved[-1] == 12
    whole, full = (read_record(Path(name)) for name in ("whole", "full"))
    assert [(row["step"], row["split"], row["loss"]) for row in full] == [
        (row["step"], row["split"], row["loss"]) for row in whole
    ]
    assert Path("full/samples.txt").read_bytes() == Path("whole/samples.txt").read_bytes()
    record_property("saves on a full disk", run.failed_saves)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB; skipped where mounting one is not permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_small_file_system_that_is_really_full(here, small_disk, record_property):
    """Filled up by somebody else during the run, and given room again later."""
    out_dir, said, full_since = small_disk / "run", [], 0
    with new_run(config_for(here, str(out_dir), max_steps=40)) as run:
        for event in train(run):
            if isinstance(event, Saved) and event.step > 0 and not full_since:  # so nothing is being written
                full_since = event.step
                with open(small_disk / "ballast", "wb", buffering=0) as ballast, contextlib.suppress(OSError):
                    while ballast.write(bytes(4096)) == 4096:
                        pass
            if isinstance(event, Step) and event.step in (12, 20):
                assert checkpoint.newest_state(out_dir)[1]["step"] == full_since
            if isinstance(event, Step) and event.step == 30:
                (small_disk / "ballast").unlink()
            said += [event.text for event in [event] if isinstance(event, Notice)]
    assert sum(line.startswith(UNSAVED) for line in said) == 1
    assert run.unsaved is None
    assert checkpoint.newest_state(out_dir)[1]["step"] == 40
    assert [row["step"] for row in read_record(out_dir) if row["split"] == "val"] == list(range(0, 41, 4))
    record_property("saves on a full disk", run.failed_saves)


def test_a_last_save_that_fails_shows_in_the_exit_code(here, losscurve, monkeypatch):
    plain = files.writing

    def full(path):
        if path.name == "model.pt" and "step-000008" in {p.name for p in path.parent.iterdir()}:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "writing", full)
        code, out, err = losscurve(f"train {flags(text='text.txt')}")
    assert code == 1
    assert "error: the last save failed: step 12 (No space left on device); the last saved step is 8" in err
    assert "--resume" in err
    assert "saved checkpoints/model.pt" not in out
    assert losscurve("train --resume")[0] == 0


def test_a_changed_setting_or_machine_is_noticed(here, losscurve):
    with new_run(config_for(here, "checkpoints")) as run:
        until(run, 6)
    path = Path("checkpoints/config.toml")
    text = path.read_text()
    path.write_text(text.replace("seed = 1337", "seed = 1338"))
    code, _, err = losscurve("train --resume")
    assert code == 2
    assert "seed is 1338, and the checkpoint was trained with 1337" in err
    path.write_text(text)
    env = storage.read_json(Path("checkpoints/env.json"))
    storage.write_json(Path("checkpoints/env.json"), env | {"torch": "1.0", "threads": 99})
    code, _, err = losscurve("train --resume")
    assert code == 0
    assert "torch was 1.0 and is" in err
    assert "threads was 99 and is" in err


def test_a_bad_state_is_set_aside_under_a_name_that_says_so(here, losscurve):
    with new_run(config_for(here, "checkpoints")) as run:
        until(run, 8)
    newest = checkpoint.saved_steps(Path("checkpoints"))[-1]
    path = Path("checkpoints", checkpoint.folder_name(newest), "model.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    code, out, _ = losscurve("verify checkpoints")
    assert code == 1
    assert f"DAMAGED  checkpoints/step-{newest:06d}" in out
    code, _, err = losscurve("train --resume")
    assert code == 0
    assert f"it is now damaged-step-{newest:06d}" in err
    assert losscurve("verify checkpoints")[0] == 0


def test_show_batch_prints_what_the_step_was_trained_on(here, losscurve, ledger):
    with new_run(config_for(here, "checkpoints")) as run:
        list(train(run))
        tokenizer = run.parts.tokenizer
    code, out, _ = losscurve("show-batch --step 5")
    assert code == 0
    windows = out.split("--- step 5, window ")[1:]
    assert len(windows) == 4
    import numpy as np

    size = 4 * 16 * 8
    x = np.frombuffer(ledger[4][0][:size], dtype=np.int64).reshape(4, 16)
    for shown, ids in zip(windows, x, strict=True):
        assert shown.split(" ---\n", 1)[1].startswith(tokenizer.decode(ids.tolist()))
    assert losscurve("show-batch --step 0")[0] == 2


@pytest.mark.skipif(not TORTURE, reason="starts three processes: in make torture")
def test_a_killed_try_of_several_at_once_leaves_no_process_and_no_warning(here, start):
    line = f"try text.txt {flags(max_steps=3000).replace('--max_lr 0.01', '')} --vary max_lr=1e-2,1e-3 --seeds 1"
    process = start(f"{line} --jobs 2 --out_dir t")
    end = time.monotonic() + 60
    while len(list(here.glob("t/*/*/step-*"))) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    process.kill()
    _, err = process.communicate(timeout=60)  # ends when the last process that shares its stderr has ended
    assert err == ""
    for run in here.glob("t/*/seed-*"):
        assert 0 < checkpoint.saved_steps(run)[-1] < 3000  # each saved what it had
        assert not in_use(run)
