"""Names of devices and precisions, on machines that this one pretends to be."""

import itertools
import json
import math
import os
import platform
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llm.errors import UserError
from llm.machine import device
from llm.machine.device import choose_device, choose_dtype, describe_device, environment, keep_memory, precision

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


@pytest.fixture
def machine(monkeypatch):
    """`machine(cuda=2, mps=True, capability=9, fast=True)`: what PyTorch is to find here."""

    def pretend(cuda=0, mps=False, capability=8, fast=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (capability, 0))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(device, "_bf16_is_fast", lambda: fast)

    return pretend


@pytest.mark.parametrize(
    ("there", "name", "expected"),
    [
        ({}, "auto", "cpu"),
        ({"cuda": 1}, "auto", "cuda"),
        ({"mps": True}, "auto", "mps"),
        ({"cuda": 1, "mps": True}, "auto", "mps"),  # the chapter's order
        ({"cuda": 1, "mps": True}, "cpu", "cpu"),
        ({"cuda": 2}, "cuda", "cuda"),
        ({"cuda": 2}, "cuda:1", "cuda:1"),
        ({"mps": True}, "mps", "mps"),
    ],
)
def test_the_device_a_name_means(machine, there, name, expected):
    machine(**there)
    assert choose_device(name) == torch.device(expected)


@pytest.mark.parametrize(
    ("there", "name", "reason"),
    [
        ({}, "cuda", "PyTorch sees 0 CUDA devices here"),
        ({}, "cuda:0", "PyTorch sees 0 CUDA devices here"),
        ({"cuda": 2}, "cuda:2", "PyTorch sees 2 CUDA devices here"),
        ({"cuda": 1}, "mps", "no Apple GPU"),
    ],
)
def test_a_device_that_is_not_there(machine, there, name, reason):
    machine(**there)
    with pytest.raises(UserError) as caught:
        choose_device(name)
    message = str(caught.value)
    assert message.startswith(f"device = {name!r}: ")
    assert reason in message
    assert "--device auto" in message
    assert "\n" not in message


NO_NAMES = ["", "gpu", "CPU", "cpu:", "cpu:0", "cpu:²", "cuda:", "cuda:-1", "cuda:x", "cuda:01", "cuda:9999999999999"]


@pytest.mark.parametrize("name", [*NO_NAMES, "cuda:²", "cuda:1:2", "mps:0", "cuda 0", " cpu", "cpu\n", "meta", "xpu"])
def test_a_name_that_is_no_device(machine, name):
    machine(cuda=10, mps=True)
    with pytest.raises(UserError) as caught:
        choose_device(name)
    assert str(caught.value) == f"device = {name!r}: expected auto, cpu, mps, cuda or cuda:N"


@pytest.mark.parametrize(
    ("there", "device", "expected"),
    [
        ({"fast": False}, CPU, torch.float32),
        ({"fast": True}, CPU, torch.bfloat16),
        ({"capability": 7, "fast": True}, CUDA, torch.float32),
        ({"capability": 8}, CUDA, torch.bfloat16),
        ({"capability": 9}, torch.device("cuda:0"), torch.bfloat16),
        ({"fast": True}, MPS, torch.float32),
    ],
)
def test_auto_is_bfloat16_where_it_is_fast(machine, there, device, expected):
    machine(**there)
    assert choose_dtype("auto", device) == expected


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_named_precision_is_taken_at_its_word(machine, device, name):
    machine(capability=7, fast=True)
    assert choose_dtype(name, device) == getattr(torch, name)


def test_float16_on_mps_is_refused():
    with pytest.raises(UserError, match="dtype = 'float16': not supported on mps"):
        choose_dtype("float16", MPS)
    assert choose_dtype("bfloat16", MPS) == torch.bfloat16


@pytest.mark.parametrize("disturbed", [(), range(4), range(6, 14)])
@pytest.mark.parametrize(("slow", "fast"), [(2e-3, False), (8e-4, False), (5e-4, True)])
def test_the_probe_wants_a_clear_gain(monkeypatch, slow, fast, disturbed):
    """A clock that makes a float32 product of 512 take 1 ms, and a bfloat16 one `slow`; some take longer than they do,
    where a neighbour has the processor.
    """
    now, real, count = [0.0], torch.mm, itertools.count()

    def mm(a, b):
        now[0] += (slow if a.dtype == torch.bfloat16 else 1e-3) * (len(a) / 512) ** 3
        if a.dtype == torch.bfloat16 and next(count) in disturbed:
            now[0] += 0.02
        return a

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(device.time, "perf_counter", lambda: now[0])
    assert device._bf16_is_fast.__wrapped__() == fast
    monkeypatch.setattr(torch, "mm", real)


def test_a_machine_hopeless_at_bfloat16_is_found_out_by_a_small_product(monkeypatch):
    sizes, now = [], [0.0]

    def mm(a, b):
        sizes.append(len(a))
        now[0] += 1.0 if a.dtype == torch.bfloat16 else 1e-6
        return a

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(device.time, "perf_counter", lambda: now[0])
    assert not device._bf16_is_fast.__wrapped__()
    assert set(sizes) == {64}


@pytest.mark.parametrize("capability", ["AVX2", "DEFAULT"])
def test_an_x86_without_avx512_is_not_even_tried(monkeypatch, capability):
    def mm(a, b):
        raise AssertionError("a product of bfloat16 takes a second to be set up there")

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(device.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert not device._bf16_is_fast.__wrapped__()


def test_float32_is_left_as_it_is():
    a, b = torch.randn(8, 8), torch.randn(8, 8)
    with precision(torch.float32, CPU):
        assert not torch.is_autocast_enabled("cpu")
        assert torch.equal(a @ b, torch.mm(a, b))
        assert (a @ b).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_products_in_its_precision(dtype):
    a, b = torch.randn(8, 8), torch.randn(8, 8)
    with precision(dtype, CPU):
        product = a @ b
        assert product.dtype == dtype
    assert (a @ b).dtype == torch.float32
    assert torch.equal(product, a.to(dtype) @ b.to(dtype))


def test_what_is_copied_to_cuda_is_pinned_in_one_piece(monkeypatch):
    """x and y are views of the same ids, without the last column and without the first."""
    pinned = []

    def pin_memory(tensor):
        pinned.append(tensor)
        return SimpleNamespace(to=lambda device, non_blocking: tensor)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    x = np.arange(12).reshape(3, 4)[:, :-1]
    assert np.array_equal(device.onto(CUDA, x), x)
    assert [tensor.is_contiguous() for tensor in pinned] == [True]


def test_keeping_memory_breaks_nothing(monkeypatch):
    keep_memory()
    assert torch.ones(2**20).sum() == 2**20
    for name in ("darwin", "win32"):
        monkeypatch.setattr(device.sys, "platform", name)
        monkeypatch.setattr(device.ctypes, "CDLL", None)  # not to be called
        keep_memory()
    monkeypatch.setattr(device.sys, "platform", "linux")
    monkeypatch.setattr(device.platform, "libc_ver", lambda: ("", ""))  # musl
    keep_memory()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_what_was_freed_before_a_run_goes_back_to_the_system():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    keep_memory()
    blocks = [bytes(5000) for _ in range(20_000)]
    last = bytes(5000)  # keeps the heap from shrinking at its end
    del blocks
    before = resident()
    keep_memory()
    assert before - resident() > 80_000_000
    assert last


def test_the_device_in_words(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Card")
    assert describe_device(CPU, torch.float32) == "cpu (3 threads), float32"
    assert describe_device(torch.device("cuda:1"), torch.bfloat16) == "A Card (cuda:1), bfloat16"
    assert describe_device(MPS, torch.float32) == "mps, float32"


def test_the_environment_can_be_written_as_json():
    facts = environment()
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def slow_clock(monkeypatch, seconds, slice_=math.inf, pause=0.0, phase=0.0):
    """Products that take `seconds(size, dtype)` of work, on a processor that runs this process for `slice_` seconds and
    then another for `pause`. Returns the sizes seen.
    """
    sizes, clock = [], {"now": phase, "left": slice_ - phase % slice_}

    def mm(a, b):
        sizes.append(len(a))
        work = seconds(len(a), a.dtype)
        while work > clock["left"]:
            work -= clock["left"]
            clock["now"] += clock["left"] + pause
            clock["left"] = slice_
        clock["now"] += work
        clock["left"] -= work
        return a

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(device.time, "perf_counter", lambda: clock["now"])
    return sizes


def rate_of(dtype=torch.float32):
    return device.matrix_rate.__wrapped__(CPU, dtype)


@pytest.mark.parametrize("rate", [1e9, 1e11, 1e15])
@pytest.mark.parametrize(("threads", "size"), [(1, 512), (8, 1024)])
def test_the_matrix_rate_is_that_of_a_product_of_a_size_chosen_beforehand(monkeypatch, rate, threads, size):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    sizes = slow_clock(monkeypatch, lambda n, dtype: 2 * n**3 / rate)
    assert rate_of() == pytest.approx(rate)
    assert set(sizes) == {size}
    assert len(sizes) == 3 if rate == 1e9 else len(sizes) >= 10  # where one takes long, it is not often repeated


@pytest.mark.parametrize("phase", [0.0, 1.3e-3, 2.6e-3, 3.9e-3])
def test_a_neighbour_hardly_changes_the_matrix_rate(monkeypatch, phase):
    """9e10 operations a second, of which others get three quarters of the time, 12 ms after each 4 of ours."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    slow_clock(monkeypatch, lambda n, dtype: 2 * n**3 / 9e10, 4e-3, 12e-3, phase)
    assert rate_of() == pytest.approx(9e10, rel=0.01)


def test_a_machine_where_every_product_waits_for_another_process_is_not_said_to_do_nothing(monkeypatch):
    """One of the threads is always late by 12 ms; a product of 128 alone would give 0.3 GFLOP/s."""
    slow_clock(monkeypatch, lambda n, dtype: 2 * n**3 / 9e10 + 12e-3)
    assert rate_of() > 1e10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_precision_without_instructions_is_measured_by_a_small_product(monkeypatch, dtype):
    """A product of 1,024 in float16 takes two seconds on many a CPU."""
    sizes = slow_clock(monkeypatch, lambda n, dtype: 2 * n**3 / (9e10 if dtype is torch.float32 else 2e9))
    monkeypatch.setattr(device, "_bf16_is_fast", lambda: False)
    assert rate_of(dtype) == pytest.approx(2e9)
    assert set(sizes) == {128}


@pytest.mark.parametrize(("multiprocessors", "size"), [(20, 4096), (132, 8192)])
def test_a_large_card_gets_a_large_product(monkeypatch, multiprocessors, size):
    properties = SimpleNamespace(multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert device._product_size(CUDA, torch.bfloat16) == size


@pytest.mark.parametrize("phase", range(8))
@pytest.mark.parametrize(("gain", "fast"), [(0.1, False), (1.0, False), (1.2, False), (2.0, True), (4.0, True)])
def test_a_neighbour_does_not_change_the_choice_of_a_precision(monkeypatch, gain, fast, phase):
    """As above; of five pairs of products all those in one precision may be interrupted."""

    def seconds(size, dtype):
        return 2 * size**3 / 9e10 / (gain if dtype is torch.bfloat16 else 1)

    slow_clock(monkeypatch, seconds, 4e-3, 12e-3, phase / 2000)
    assert device._bf16_is_fast.__wrapped__() == fast
