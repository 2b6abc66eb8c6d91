"""Trackers: what TensorBoard and W&B hold of a run is its record, read back by their own readers."""

import html
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import append, environment, flags, write_samples

from llm.config import from_settings, to_settings, write_toml
from llm.errors import Failure, UserError
from llm.record import metrics, trackers
from llm.record.metrics import read_record
from llm.record.samples import read_samples
from llm.record.tracker import scalars
from llm.record.trackers import View, following, replay, starts

TRAIN = f"train --text text.txt --data_dir data {flags()}"
Shown = dict[str, list[tuple[int, float]]]  # by name, the points (step, value)


def expected(run_dir: Path) -> Shown:
    """What a view of a record has to show, by the words of metrics.py."""
    shown = defaultdict(list)
    for row in read_record(run_dir):
        if row["split"] == "val":
            shown["loss/val"].append((row["step"], row["loss"]))
            shown["bits_per_byte/val"].append((row["step"], row["bits_per_byte"]))
            continue
        shown["loss/train"].append((row["step"], row["loss"]))
        for key in ("lr", "grad_norm", "tokens", "seconds", "tokens_per_second", "matmul_utilisation", "data_seconds"):
            shown[key].append((row["step"], row[key]))
    told = {name: [point for point in points if point[1] is not None] for name, points in shown.items()}
    return {name: points for name, points in told.items() if points}


def events(run_dir: Path):
    """TensorBoard's own reader of what stands in a run's tensorboard/."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(run_dir / "tensorboard"), {"scalars": 0, "tensors": 0})
    read.Reload()
    return read


def scalars_of(read) -> Shown:
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def texts_of(read) -> dict[int, str]:
    return {event.step: event.tensor_proto.string_val[0].decode() for event in read.Tensors("sample/text_summary")}


def same(found: Shown, run_dir: Path) -> None:
    """Each point of the record once, in order, to the float32 that TensorBoard keeps."""
    wanted = expected(run_dir)
    assert found.keys() == wanted.keys()
    for name, points in wanted.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in points], rel=1e-6), name


class Kept:
    """What stands in W&B's file of an offline run: a log of records (LevelDB's format) of its own protocol buffers."""

    def __init__(self, run_dir: Path) -> None:
        from wandb.proto import wandb_internal_pb2

        (self.folder,) = (run_dir / "wandb").glob("offline-run-*")
        (path,) = self.folder.glob("*.wandb")
        self.shown: Shown = defaultdict(list)
        self.samples: dict[int, str] = {}
        for content in logged(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "run":
                self.run = record.run
                self.config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.WhichOneof("record_type") == "exit":
                self.code = record.exit.exit_code
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                row = {"/".join([item.key, *item.nested_key]).strip("/"): json.loads(item.value_json) for item in items}
                if "sample/path" in row:
                    page = self.folder / "files" / row["sample/path"]
                    self.samples[row["_step"]] = page.read_text(encoding="utf-8")
                for name, value in row.items():
                    if not name.startswith(("_", "sample/")):
                        self.shown[name].append((row["_step"], value))


def logged(data: bytes):
    """The records of a LevelDB log, after W&B's header of 7 bytes."""
    assert data[:4] == b":W&B"
    at, whole = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


@pytest.fixture
def no_account(monkeypatch, tmp_path):
    """W&B as on a machine where nobody has set it up."""
    for name in [name for name in os.environ if name.startswith("WANDB_")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()


def typed(line: str, **variables: str) -> subprocess.CompletedProcess:
    """A command in a process of its own: W&B starts another, which ends with it."""
    env = environment() | variables
    # requests turns this warning off for itself, which another thread's `catch_warnings` may undo at that moment
    words = [sys.executable, "-W", "error", "-W", "ignore:SOCKS support", "-m", "llm", *line.split()]
    return subprocess.run(words, env=env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


@pytest.fixture
def recorded(here):
    """A run folder by hand: 3 evaluations, training rows, samples; without weights."""
    path = here / "run"
    path.mkdir()
    config = from_settings({"max_steps": 8, "warmup_steps": 0, "text": ("a b.txt", "c.txt"), "n_layer": 3})
    (path / "config.toml").write_text(write_toml(config), encoding="utf-8")
    numbers = {"lr": 1e-3, "grad_norm": 0.5, "tokens_per_second": 10.0, "matmul_utilisation": 0.25}
    append(path, step=0, split="train", loss=5.0, lr=0.0, seconds=0.0, tokens=0)
    for step in (0, 4, 8):
        if step:
            append(path, step=step - 2, split="train", loss=4.0 - step, tokens=step, seconds=step + 0.25, **numbers)
            append(path, step=step, split="train", loss=None, tokens=step, seconds=step + 0.5, **numbers, refused=[3])
        append(path, step=step, split="val", loss=5.0 - step / 4, bits_per_byte=2.5, lr=9.0, seconds=step + 1.0)
    write_samples(path, *((step, 5.0 - step / 4, f"<b>*{step}*</b>\n\n    &amp;") for step in (0, 4, 8)))
    return path


def test_what_tensorboard_has_is_the_record(recorded, losscurve):
    code, out, err = losscurve("track run --to tensorboard")
    assert (code, out, err) == (0, "tensorboard: tensorboard --logdir run/tensorboard\n", "")
    read = events(recorded)
    found = scalars_of(read)
    assert found.pop("refused") == [(4, 1.0), (8, 1.0)]
    same(found, recorded)
    # its clock runs as the run did, up to when the record was written
    times = {event.step: event.wall_time for event in read.Scalars("loss/val")}
    assert times[8] == pytest.approx((recorded / "metrics.jsonl").stat().st_mtime)
    assert times[8] - times[0] == pytest.approx(8.0)
    # a sample is code, so that nothing in it is Markdown or HTML
    assert texts_of(read) == {step: f"    <b>*{step}*</b>\n    \n        &amp;" for step in (0, 4, 8)}
    plugin = read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    told = HParamsPluginData.FromString(plugin).session_start_info.hparams
    assert told["n_layer"].number_value == 3
    assert told["text"].string_value == "a b.txt c.txt"
    assert told["tied_lm_head"].bool_value is False
    assert told.keys() == to_settings(from_settings({"text": "x", "warmup_steps": 0})).keys()


def test_showing_it_again_replaces_what_was_there(recorded, losscurve):
    (recorded / "tensorboard").mkdir()
    (recorded / "tensorboard" / "notes.txt").write_text("mine")
    for _ in range(4):
        assert losscurve("track run --to tensorboard,tensorboard")[0] == 0
    assert len(list((recorded / "tensorboard").glob("events*"))) == 2  # one may be open in a TensorBoard
    assert [step for step, _ in scalars_of(events(recorded))["loss/val"]] == [0, 4, 8]
    assert texts_of(events(recorded)).keys() == {0, 4, 8}
    assert (recorded / "tensorboard" / "notes.txt").read_text() == "mine"


def test_a_record_that_is_cut_back_is_shown_anew_also_to_a_tensorboard_that_is_open(recorded):
    view = View(recorded, from_settings({}), starts(["tensorboard"], print)["tensorboard"])
    view.update()
    opened = events(recorded)
    assert [step for step, _ in scalars_of(opened)["loss/val"]] == [0, 4, 8]
    metrics.Record(recorded).cut(4)
    append(recorded, step=6, split="train", loss=3.125, seconds=20.0)
    view.update()
    append(recorded, step=8, split="val", loss=2.5, seconds=21.0)
    view.update()
    view.update()
    view.close()
    assert scalars_of(events(recorded))["loss/val"] == [(0, 5.0), (4, 4.0), (8, 2.5)]
    assert scalars_of(events(recorded))["loss/train"] == [(0, 5.0), (2, 0.0), (6, 3.125)]
    opened.Reload()
    assert scalars_of(opened)["loss/val"] == [(0, 5.0), (4, 4.0), (8, 2.5)]


class Told:
    """A tracker that keeps what it is told."""

    def __init__(self, run_dir, config, first):
        self.where, self.first, self.heard = "here", first, []
        TOLD.append(self)

    def row(self, row):
        self.heard.append((row["step"], row["split"]))

    def sample(self, step, text):
        self.heard.append((step, text))

    def flush(self):
        pass

    def close(self):
        self.heard.append("closed")


TOLD: list[Told] = []


def test_a_view_tells_each_row_once_as_it_appears_and_each_sample_after_its_evaluation(tmp_path):
    TOLD.clear()
    view = View(tmp_path, from_settings({}), Told)
    view.update()
    assert (TOLD, view.where) == ([], None)  # nothing to show yet
    append(tmp_path, step=0, split="train", loss=5.0)
    view.update()
    assert TOLD == []  # W&B needs an evaluation to know the run by
    append(tmp_path, step=0, split="val", loss=4.0)
    view.update()
    (told,) = TOLD
    assert told.first["loss"] == 4.0
    record = tmp_path / "metrics.jsonl"
    with open(record, "ab") as file:
        file.write(b'{"step": 1, "split": "tr')  # its writer is in the middle
    view.update()
    assert told.heard == [(0, "train"), (0, "val")]
    with open(record, "ab") as file:
        file.write(b'ain", "loss": 3.0}\n')
    write_samples(tmp_path, (0, 4.0, "late"))  # written after the row was seen
    view.update()
    assert told.heard[2:] == [(1, "train"), (0, "late")]
    append(tmp_path, step=2, split="val", loss=2.0)
    append(tmp_path, step=3, split="train", loss=2.0)
    write_samples(tmp_path, (0, 4.0, "late"), (2, 2.0, "a"), (9, 2.0, "of an evaluation that is still to be recorded"))
    view.update()
    view.update()
    assert told.heard[4:] == [(2, "val"), (2, "a"), (3, "train")]
    metrics.Record(tmp_path).cut(1)
    view.update()
    assert told.heard[7:] == ["closed"]
    assert TOLD[1].heard == [(0, "train"), (0, "val"), (0, "late"), (1, "train")]
    assert TOLD[1].first == told.first
    record.unlink()
    view.update()  # a folder that was cleared is no reason to fail
    view.close()
    assert TOLD[1].heard[4:] == ["closed"]


def test_numbers_that_are_none_are_not_shown():
    row = {
        "step": 1,
        "split": "train",
        "loss": float("nan"),
        "lr": None,
        "grad_norm": "x",
        "tokens": 5,
        "matmul_utilisation": 0.5,
    }
    assert scalars(row) == {"tokens": 5, "matmul_utilisation": 0.5}
    assert scalars({"step": 1, "split": "val", "loss": 2.0, "lr": 3.0}) == {"loss/val": 2.0}


@pytest.fixture
def trained(here, no_account):
    """A run that TensorBoard and W&B followed, in a process of its own behind a proxy that listens."""
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        proxy.listen()
        proxy.setblocking(False)
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), address)
        shown = typed(f"{TRAIN} --out_dir runs/<b> --track tensorboard --track wandb", **proxies)
        with pytest.raises(BlockingIOError):  # nobody asked for anything
            proxy.accept()
    assert shown.returncode == 0, shown.stderr
    return shown


def test_a_training_and_its_resume_are_followed_and_nothing_is_sent_without_an_account(trained, here):
    run_dir = here / "runs" / "<b>"
    same(scalars_of(events(run_dir)), run_dir)
    kept = Kept(run_dir)
    same(kept.shown, run_dir)
    assert (kept.run.project, kept.run.display_name, kept.code) == ("losscurve", "<b>", 0)
    config = to_settings(from_settings({"n_layer": 2}))
    assert kept.config.keys() >= config.keys() - {"text"}
    assert (kept.config["n_layer"], kept.config["text"]) == (2, "text.txt")
    samples = [(sample.step, sample.prompt + sample.text) for sample in read_samples(run_dir)]
    assert [step for step, _ in samples] == [0, 4, 8, 12]
    wanted = {step: f"<p>step {step}</p><pre>{html.escape(text)}</pre>" for step, text in samples}
    assert sorted(kept.samples.values()) == sorted(wanted.values())
    literal = {step: "\n".join("    " + line for line in text.splitlines()) for step, text in samples}
    assert texts_of(events(run_dir)) == literal
    lines = trained.stderr.splitlines()
    assert (
        "warning: W&B has no key here, so this run is written offline and nothing is sent; run wandb login" in lines[0]
    )
    assert "note: tensorboard: tensorboard --logdir 'runs/<b>/tensorboard'" in lines
    assert f"note: wandb: offline; to send it: wandb sync '{kept.folder.relative_to(here)}'" in lines
    assert len(lines) == 4  # and of the short warm-up

    # a resumed run is shown once, under the same name
    shown = typed("train --out_dir runs/<b> --resume --max_steps 16 --track wandb,tensorboard", WANDB_MODE="offline")
    assert shown.returncode == 0, shown.stderr
    after = Kept(run_dir)  # one folder: the one before is gone
    same(after.shown, run_dir)
    same(scalars_of(events(run_dir)), run_dir)
    assert after.shown["loss/val"][-1][0] == 16
    assert after.run.run_id == kept.run.run_id
    assert "no key" not in shown.stderr  # offline was asked for
    assert not any(process_of_wandb(run_dir))


def process_of_wandb(run_dir: Path):
    """Processes of W&B's service that still hold files of the run."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"wandb-core" in (process / "cmdline").read_bytes():
                yield from (link for link in (process / "fd").iterdir() if str(run_dir) in os.readlink(link))
        except OSError:
            continue


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_one_line_before_anything_is_done(name, here, losscurve, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, name, None)
    code, out, err = losscurve(f"{TRAIN} --track {name}")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.endswith(f'; pip install "losscurve[{name}]"\n')
    assert [path.name for path in here.iterdir()] == ["text.txt"]


def test_wandb_without_a_home_is_no_fault_of_the_installation(here, losscurve, monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user that no file of the system knows
    code, out, err = losscurve(f"{TRAIN} --track wandb")
    assert (code, out) == (2, "")
    assert err == "error: HOME is not set, and W&B needs a home folder for its settings; set it, such as HOME=/tmp\n"


def test_a_tracker_that_does_not_start_differs_from_one_that_is_missing(monkeypatch):
    def fail(say):
        raise PermissionError(13, "Permission denied", "settings")

    monkeypatch.setattr(trackers, "with_wandb", fail)
    with pytest.raises(UserError, match=r"^wandb does not start \(PermissionError: .*denied: 'settings'\); fix this"):
        starts(["wandb"], print)


def test_an_unknown_tracker_is_named_with_those_that_are_known(recorded, losscurve):
    for line in (f"{TRAIN} --track tensorboard,mlflow", "track run --to mlflow"):
        code, _, err = losscurve(line)
        assert (code, err) == (2, "error: no tracker is called 'mlflow'; known: tensorboard, wandb\n")
    assert losscurve("track run")[0] == 2
    assert losscurve("track nowhere --to tensorboard")[0] == 2


def test_what_cannot_be_replayed_says_why(recorded, losscurve, monkeypatch):
    def broken(run_dir, config, first):
        raise RuntimeError("no\nroom")

    with pytest.raises(Failure, match="wandb: RuntimeError: no room; fix this and retry"):
        replay(recorded, from_settings({}), "wandb", broken)
    record = recorded / "metrics.jsonl"
    lines = record.read_bytes()
    record.write_bytes(b"{\n" + lines)
    code, _, err = losscurve("track run --to tensorboard")
    assert code == 2
    assert "line 1 is damaged" in err
    record.write_bytes(lines.splitlines(keepends=True)[0])
    with pytest.raises(UserError, match="no evaluation is recorded yet"):
        replay(recorded, from_settings({}), "tensorboard", Told)
    record.write_bytes(lines)
    monkeypatch.setattr(trackers, "SECONDS", 0.01)
    with following({"wandb": Told}, recorded, from_settings({}), print, print):
        deadline = time.monotonic() + 5
        while not (recorded / "wandb" / ".lock").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.5)
        with pytest.raises(UserError, match="in use by another process"):
            replay(recorded, from_settings({}), "wandb", Told)


class Breaks:
    """A tracker that fails at one thing."""

    at = "start"

    def __init__(self, run_dir, config, first):
        self.where = "nowhere"
        self._fail("start")

    def _fail(self, what):
        if what == self.at:
            raise SystemExit("gave up") if what == "flush" else OSError(28, "No space left on device")

    def row(self, row):
        self._fail("row")

    def sample(self, step, text):
        self._fail("sample")

    def flush(self):
        self._fail("flush")

    def close(self):
        self._fail("close")


@pytest.mark.parametrize("at", ["start", "row", "sample", "flush", "close"])
def test_a_tracker_that_fails_is_warned_of_once_and_training_goes_on(at, here, losscurve, monkeypatch):
    monkeypatch.setattr(Breaks, "at", at)
    monkeypatch.setattr(trackers, "with_wandb", lambda say: Breaks)
    monkeypatch.setattr(trackers, "SECONDS", 0.01)
    code, out, err = losscurve(f"{TRAIN} --track wandb,tensorboard --no_compile")
    assert code == 0
    assert out.endswith("saved checkpoints/model.pt\n")
    (warning,) = [line for line in err.splitlines() if "warm-up" not in line and "note:" not in line]
    cause = "SystemExit: gave up" if at == "flush" else "OSError: [Errno 28] No space left on device"
    assert warning == (
        f"warning: wandb failed, and training continues without it ({cause}). "
        "The record is complete; to show it: losscurve track checkpoints --to wandb"
    )
    same(scalars_of(events(here / "checkpoints")), here / "checkpoints")  # the other one is not harmed


def test_a_tracker_that_blocks_holds_nothing_up(here, losscurve, monkeypatch):
    release = threading.Event()

    class Blocks(Breaks):
        at = ""

        def row(self, row):
            release.wait()

    monkeypatch.setattr(trackers, "with_wandb", lambda say: Blocks)
    monkeypatch.setattr(trackers, "SECONDS", 0.01)
    monkeypatch.setattr(trackers, "PATIENCE", 0.3)
    start = time.monotonic()
    code, out, err = losscurve(f"{TRAIN} --track wandb")
    assert time.monotonic() - start < 10
    release.set()
    assert (code, out.endswith("saved checkpoints/model.pt\n")) == (0, True)
    assert "warning: wandb did not finish within 0.3 s and is abandoned. The record is complete; to show it: " in err
    assert "losscurve track checkpoints --to wandb" in err
    for thread in threading.enumerate():
        if thread.name == "wandb":
            thread.join(5)


def fake_wandb(mode: str = "online", api_key: str | None = None):
    """W&B as far as we use it, keeping how it was begun."""
    calls: list[dict] = []
    logged: list[tuple[int, dict]] = []
    run = SimpleNamespace(
        dir="x/files",
        url="https://wandb.example/run",
        logged=logged,
        define_metric=lambda name, summary: None,
        log=lambda row, step: logged.append((step, row)),
        finish=lambda: None,
    )
    settings = SimpleNamespace(mode=mode, api_key=api_key, base_url="https://api.wandb.ai", project=None, run_name=None)
    module = SimpleNamespace(
        setup=lambda: SimpleNamespace(settings=settings),
        init=lambda **how: calls.append(how) or run,
        Settings=lambda **how: how,
        Html=lambda page, inject: page,
        run=run,
    )
    return module, calls


@pytest.mark.parametrize(
    ("asked", "key", "mode", "said"),
    [
        ("online", None, "offline", "no key here"),  # its default, where nobody has set it up
        ("online", "WANDB_API_KEY", "online", ""),
        ("online", "WANDB_IDENTITY_TOKEN_FILE", "online", ""),
        ("online", "settings", "online", ""),
        ("online", "netrc", "online", ""),
        ("online", "netrc of another", "offline", "no key here"),
        ("online", "netrc that is broken", "offline", "no key here"),
        ("run", "netrc", "online", ""),
        ("offline", "WANDB_API_KEY", "offline", ""),
        ("dryrun", "WANDB_API_KEY", "offline", ""),
        ("disabled", None, "disabled", ""),
        ("shared", "WANDB_API_KEY", "shared", ""),
    ],
)
def test_what_is_sent_is_what_the_user_set_up(asked, key, mode, said, recorded, no_account, monkeypatch):
    module, calls = fake_wandb(asked, "k" * 40 if key == "settings" else None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    if key in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.setenv(key, "x")
    netrcs = {
        "netrc": "machine api.wandb.ai login user password secret\n",
        "netrc of another": "machine example.org login user password secret\n",
        "netrc that is broken": "machine\n",
    }
    if key in netrcs:
        path = Path(os.environ["HOME"]) / ".netrc"
        path.write_text(netrcs[key])
        path.chmod(0o600)
    told: list[str] = []
    where = replay(recorded, from_settings({}), "wandb", starts(["wandb"], told.append)["wandb"])
    assert [call["mode"] for call in calls] == [mode]
    assert (said in " ".join(told)) if said else told == []
    words = {"offline": "to send it: wandb sync x", "disabled": "https", "online": "https://wandb.example/run"}
    assert words.get(mode, "https") in where
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    assert calls[0]["dir"] == str(recorded)
    samples = {step: row["sample"] for step, row in module.run.logged if "sample" in row}
    assert samples[4] == "<p>step 4</p><pre>&lt;b&gt;*4*&lt;/b&gt;\n\n    &amp;amp;</pre>"
    steps = [step for step, _ in module.run.logged]
    assert steps == sorted(steps)  # W&B drops what goes back
    assert calls[0]["settings"]["login_timeout"] == 1.0  # a prompt, should there be one, holds nothing up


def test_online_without_a_key_is_an_error_before_training(here, no_account, losscurve, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb()[0])
    monkeypatch.setenv("WANDB_MODE", "online")
    code, out, err = losscurve(f"{TRAIN} --track wandb")
    assert (code, out) == (2, "")
    assert err == "error: WANDB_MODE = online: W&B has no key here; run wandb login, or set WANDB_MODE=offline\n"
    assert [path.name for path in here.iterdir() if path.name != "home"] == ["text.txt"]


def test_another_run_in_the_same_folder_has_another_name_in_wandb(recorded, no_account, monkeypatch):
    module, calls = fake_wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    start = starts(["wandb"], print)["wandb"]
    replay(recorded, from_settings({}), "wandb", start)
    append(recorded, step=9, split="train", loss=1.0)
    replay(recorded, from_settings({}), "wandb", start)
    metrics.Record(recorded).cut(-1)
    append(recorded, step=0, split="val", loss=5.0, bits_per_byte=2.5, lr=9.0, seconds=1.001)
    replay(recorded, from_settings({}), "wandb", start)
    first, again, other = (call["id"] for call in calls)
    assert first == again != other
