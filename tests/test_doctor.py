"""The doctor: every check finds what is broken, says how to fix it, and ends."""

import http.server
import io
import re
import socket
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llm import llama
from llm.checks import doctor, hardware, reachable
from llm.checks import one_step as stepping
from llm.checks.check import Check
from llm.checks.doctor import bounded
from llm.checks.one_step import Outcome, differences, one_step, parity, tiny_model
from llm.checks.reachable import cached, connection_error
from llm.commands.check.doctor import MARKS
from llm.commands.main import main
from llm.config import from_settings
from llm.data import batch_at
from llm.errors import Failure
from llm.machine import processors
from llm.storage import download
from llm.tokens import bpe
from llm.train import train_step

CPU = torch.device("cpu")
LIMITS = (stepping.LOSS_TOLERANCE, stepping.GRADIENT_TOLERANCE, stepping.UPDATE_TOLERANCE)


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """Run in an empty folder with empty caches and without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOSSCURVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setattr(reachable, "connection_error", lambda url: "no network")
    return tmp_path


def test_the_packages_are_those_of_the_project():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert dict(line.split(">=") for line in project["dependencies"]) == doctor.NEEDED
    for name, (packages, _) in doctor.EXTRAS.items():
        assert [line.split(">=")[0] for line in project["optional-dependencies"][name]] == list(packages)


def test_each_check_is_a_line_and_the_exit_code_is_0_if_nothing_needed_is_broken(alone, losscurve):
    code, out, err = losscurve("doctor")
    lines = out.splitlines()
    assert (code, err, lines[-1]) == (0, "", "everything that training needs works")
    assert {line[0] for line in lines[:-1]} <= set(MARKS.values())
    names = [line[2:14].strip() for line in lines[:-1]]
    assert names[:3] == ["packages", "threads", "bfloat16"]
    assert names[5:] == ["one step", "disk", "text", "vocabulary", "dashboard", "tensorboard", "wandb"]
    assert f"torch {torch.__version__}" in lines[0]
    missing = next(line for line in lines if line[2:].startswith("text"))
    assert missing.startswith("–")
    assert re.search(r"no network\): runs without .*; try: curl .*input\.txt", missing)
    assert [path.name for path in alone.iterdir()] == []  # it leaves nothing behind


def test_a_package_that_is_missing_or_too_old_ends_the_list(alone, losscurve, monkeypatch):
    monkeypatch.setattr(doctor, "NEEDED", {"numpy": "99.1", "nosuchpackage": "1", "rich": "1"})
    code, out, _ = losscurve("doctor")
    assert code == 1
    assert len(out.splitlines()) == 2
    assert out.startswith("✗ packages")
    assert "is older than 99.1; nosuchpackage cannot be imported" in out
    assert 'try: pip install --upgrade "numpy>=99.1" "nosuchpackage>=1"\n1 to fix' in out


def test_versions_are_compared_as_numbers():
    assert doctor.numbers("2.13.0+cpu") == [2, 13, 0]
    assert doctor.numbers("2.6") <= doctor.numbers("2.13.0a0")


def reference_step(arch: str, dropout: float) -> Outcome:
    """Compute the same update in float64, from logits, torch's cross-entropy and AdamW's formula."""
    shape = {"vocab_size": 257, "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 64, "dropout": dropout}
    if arch == "llama":
        shape |= {"arch": "llama", "n_kv_head": 1}
    config = from_settings(shape)
    torch.manual_seed(config.seed)
    model = tiny_model(config.model).double().train()
    tokens = doctor_tokens()
    batch = batch_at(tokens, config.seed, 0, 8, 32)
    x, y, seeds = (torch.from_numpy(part) for part in (batch.x, batch.y, batch.seeds))
    logits = model(x, seeds=seeds)[0]
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    # in the first step of AdamW, the bias-corrected moments are the gradient and its square
    update = -config.max_lr * (gradient / (gradient.abs() + 1e-8) + config.weight_decay * weights)
    return Outcome(loss.item(), gradient, update)


def doctor_tokens():
    import numpy as np

    return np.random.default_rng(0).integers(0, 257, 4096).astype(np.uint16)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_a_step_is_that_of_an_independent_reference_well_within_the_tolerances(arch, dropout):
    found = differences(reference_step(arch, dropout), one_step(CPU, arch, dropout))
    assert found[0] < stepping.LOSS_TOLERANCE / 10
    assert found[1] < stepping.GRADIENT_TOLERANCE / 10
    assert found[2] < stepping.UPDATE_TOLERANCE / 2


def test_the_same_step_twice_is_the_same():
    before = torch.random.get_rng_state()
    assert differences(one_step(CPU), one_step(CPU)) == (0.0, 0.0, 0.0)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_every_matrix_has_a_gradient_that_a_wrong_device_could_get_wrong(arch):
    config = from_settings({"vocab_size": 257, "block_size": 32} | stepping.SHAPES[arch])
    sizes = [p.numel() for p in tiny_model(config.model).parameters()]
    assert all(gradient.any() for gradient in one_step(CPU, arch).gradient.split(sizes))


def gelu_of_another(monkeypatch):
    monkeypatch.setattr("torch.nn.GELU.forward", lambda self, x: x * torch.sigmoid(1.702 * x))


def attention_that_sees_ahead(monkeypatch):
    whole = F.scaled_dot_product_attention
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", lambda q, k, v, *_, **__: whole(q, k, v))


def half_a_gradient(monkeypatch):
    monkeypatch.setattr(
        "torch.nn.utils.get_total_norm", lambda grads: torch.stack([g.mul_(0.5).norm() for g in grads]).norm()
    )


def another_rate(monkeypatch):
    monkeypatch.setattr("llm.train.lr_at", lambda step, config: 1.05 * config.max_lr)


def one_weight_not_updated(monkeypatch):
    whole = train_step

    def step(parts, number):
        weight = parts.model.h[0].mlp.c_fc.weight
        before = weight.detach().clone()
        done = whole(parts, number)
        weight.data.copy_(before)
        return done

    monkeypatch.setattr("llm.train.train_step", step)


def a_loss_that_is_no_number(monkeypatch):
    monkeypatch.setattr("llm.model.linear_cross_entropy", lambda x, w, y, taught: (x.sum() + w.sum()) * float("nan"))


def rotation_of_another(monkeypatch):
    whole = llama.Rotation.__init__
    monkeypatch.setattr(
        "llm.llama.Rotation.__init__", lambda self, first, T, D, theta, on: whole(self, first, T, D, 2 * theta, on)
    )


BREAKS = {
    gelu_of_another: "gpt2",
    rotation_of_another: "llama",
    attention_that_sees_ahead: "gpt2 and llama",
    half_a_gradient: "gpt2 and llama",
    another_rate: "gpt2 and llama",
    one_weight_not_updated: "gpt2 and llama",
    a_loss_that_is_no_number: "gpt2",
}


def all_steps():
    return {(arch, dropout): one_step(CPU, arch, dropout) for arch in ("gpt2", "llama") for dropout in (0.0, 0.1)}


@pytest.mark.parametrize(("broken", "names"), BREAKS.items())
def test_a_deliberately_broken_step_is_detected(broken, names, monkeypatch):
    right = all_steps()
    with monkeypatch.context() as patch:
        broken(patch)
        wrong = all_steps()
    for arch in names.split(" and "):
        found = differences(right[arch, 0.0], wrong[arch, 0.0])
        assert not all(value <= limit for value, limit in zip(found, LIMITS, strict=True)), found
    monkeypatch.setattr(
        "llm.machine.device.choose_device", lambda name: torch.device("cuda")
    )  # `parity` tells the devices apart by their type only
    monkeypatch.setattr(
        stepping, "one_step", lambda on, arch, dropout: (right if on.type == "cpu" else wrong)[arch, dropout]
    )
    check = parity()
    assert check.good is False
    assert check.remedy == "losscurve train --device cpu"
    assert check.message.startswith(f"{names} on cuda and on the cpu: loss differs")
    assert "at most 0.0001, 0.001, 0.02 is rounding" in check.message


def test_a_check_that_hangs_or_raises_is_broken_and_the_list_goes_on():
    never = threading.Event()
    check = bounded("slow", lambda: never.wait() and None, "try this", seconds=0.1)
    assert check == Check("slow", False, "no answer in 0.1 s", "try this")
    never.set()

    def raises():
        raise RuntimeError("CUDA error:\n  unspecified\n")

    assert bounded("bad", raises, "try this") == Check(
        "bad", False, "RuntimeError: CUDA error: unspecified", "try this"
    )


def test_a_host_that_accepts_and_never_answers_times_out(monkeypatch):
    monkeypatch.setattr(download, "CONNECT_SECONDS", 0.3)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/file"
        reason = connection_error(url)
    assert reason == "no answer in 0.3 s" or "timed out" in reason
    assert "refused" in connection_error(url)


class Answers(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(200 if self.path == "/file" else 404)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_a_download_is_cached_or_available_or_the_check_says_why_not(tmp_path, monkeypatch):
    path = tmp_path / "cache" / "file"
    known = b"abc"
    sum_of_it = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.HTTPServer(("127.0.0.1", 0), Answers) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        place = f"http://127.0.0.1:{server.server_port}"

        def look(url: str = "/file") -> Check:
            return cached("text", "the text", place + url, path, sum_of_it, "fix it", "nothing")

        assert look().good is True
        assert "is not in" in look().message
        assert "answers, so a run downloads it" in look().message
        assert not path.parent.exists()
        path.parent.mkdir()
        path.write_bytes(b"abd")
        assert "is damaged in" in look().message
        lost = look("/other")
        assert lost.good is None
        assert "(Not Found): nothing" in lost.message
        path.write_bytes(known)
        assert look("/other") == Check("text", True, f"the text is in {path.parent}")
        server.shutdown()
        serving.join()
    path.unlink()
    path.parent.rmdir()
    path.parent.write_bytes(b"a file where the cache should be")
    check = cached("text", "the text", "http://127.0.0.1:9/", path / "x" / "y", sum_of_it, "fix it", "nothing")
    assert (check.good, check.remedy) == (False, "fix it")


@pytest.mark.parametrize("own", [True, False])
def test_the_caches_are_those_that_training_reads(own, alone, monkeypatch):
    if own:
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(alone / "own"))
    asked = []

    def fetch(url, path, sha256, what, offline=False):
        asked.append((url, path, sha256))
        raise Failure("not here")

    monkeypatch.setattr(download, "fetch", fetch)
    looked = []
    monkeypatch.setattr(reachable, "cached", lambda name, what, *known, **more: looked.append(known[:3]))
    from llm.text import corpus

    with pytest.raises(Failure):
        corpus._shakespeare(offline=True)
    with pytest.raises(Failure):
        bpe.gpt2(offline=True)
    reachable.text()
    reachable.vocabulary()
    assert looked == asked


def test_more_threads_than_processors_are_reported(monkeypatch, tmp_path):
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    monkeypatch.setattr(processors, "CPU_LIMIT", tmp_path / "cpu.max")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert processors.processors() == 1.5
    assert [processors.cores(), processors.cores(share_of=2)] == [1, 1]
    check = hardware.threads()
    assert (check.good, check.remedy) == (None, 'export OMP_NUM_THREADS="1"')
    assert "8 on 1.5 processors" in check.message
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert processors.processors() == 64
    assert [processors.cores(), processors.cores(share_of=3)] == [64, 21]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert hardware.threads().good is True
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert hardware.threads().remedy == "unset OMP_NUM_THREADS"


def test_a_compiler_that_is_absent_or_cannot_compile_is_no_failure(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "nowhere"))
    assert hardware.compiler().good is None
    fake = tmp_path / "c++"
    fake.write_text("#!/bin/sh\necho 'fatal error: Python.h: No such file' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    check = hardware.compiler()
    assert check.good is None
    assert "cannot compile (fatal error: Python.h" in check.message
    assert check.remedy


def test_an_unusable_gpu_is_reported(monkeypatch, tmp_path):
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("there is a GPU that can be used")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100'\n")
    tool.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.version, "cuda", None)
    check = hardware.device()
    assert (check.good, check.remedy) == (None, "pip install --force-reinstall torch")
    assert "built without CUDA" in check.message
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert hardware.device() == Check(
        "device",
        False,
        "training runs on the CPU, though this machine has an NVIDIA GPU: PyTorch's CUDA 12.8 does not work with its "
        "driver; compare the CUDA version of the driver",
        "nvidia-smi",
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert hardware.device().remedy == "unset CUDA_VISIBLE_DEVICES"
    tool.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert hardware.device().message.startswith("no GPU")


def test_a_disk_that_is_full_is_broken(alone, monkeypatch):
    assert doctor.disk().good is True
    monkeypatch.setattr("llm.start.run_folder.disk_needed", lambda config: 2**80)
    check = doctor.disk()
    assert check.good is False
    assert "MiB free" in check.message
    assert check.remedy.startswith("losscurve train --out_dir")


def test_a_missing_extra_names_its_purpose(monkeypatch):
    monkeypatch.setattr(doctor, "EXTRAS", {"wandb": (("nosuchpackage", "numpy"), "a view of runs")})
    expected = Check("wandb", None, "no nosuchpackage; for a view of runs", 'pip install "losscurve[wandb]"')
    assert doctor.extra("wandb") == expected


def test_an_output_without_the_marks_gets_ascii(alone, monkeypatch):
    found = [Check("packages", True, "fine"), Check("disk", False, "in /tmp/ö\x1b[2J", "fix it")]
    monkeypatch.setattr(doctor, "examine", lambda: iter(found))
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", output)
    assert main(["doctor"]) == 1
    lines = output.buffer.getvalue().decode("ascii").splitlines()
    assert lines == ["ok packages    fine", "NO disk        in /tmp/??[2J; try: fix it", "1 to fix"]


def test_examining_imports_no_torch_before_the_packages_are_looked_at():
    code = (
        "import sys; from llm.checks import doctor; doctor.NEEDED = {'nosuchpackage': '1'}\n"
        "assert [check.good for check in doctor.examine()] == [False]\n"
        "print(sorted({'torch', 'numpy', 'tiktoken'} & set(sys.modules)))"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"
