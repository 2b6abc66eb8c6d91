"""Exponentials and row sums in C against PyTorch's in fp64, and a machine without a compiler."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from llm.machine import kernel

needs_compiler = pytest.mark.skipif(kernel.load_kernel() is None, reason="no C compiler here")


def numbers(rows, width, scale):
    torch.manual_seed(rows + width)
    return (torch.randn(rows, width) * scale).to(torch.bfloat16)


def by_columns(x):
    """A copy in float32 whose transpose is contiguous."""
    return x.float().t().contiguous().t()


def by_rows(x):
    return x.to(torch.bfloat16, copy=True)


LAYOUTS = (by_rows, by_columns)
SHIFTS = (None, 0.0, 3.3)  # None: each row's largest


def shift_of(x, given):
    return None if given is None else torch.full((len(x), 1), given)


def exponentials(x, given):
    """In fp64, of x less what is given or each row's largest, and what that is."""
    taken = x.amax(1, keepdim=True).float() if given is None else shift_of(x, given)
    return (x.double() - taken.double()).exp(), taken


@needs_compiler
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 8), (7, 1000), (65, 4097)])
@pytest.mark.parametrize("scale", [0.1, 5.0, 25.0])
@pytest.mark.parametrize("given", SHIFTS)
def test_each_is_the_nearest_bfloat16_but_for_a_few(rows, width, scale, given):
    x = numbers(rows, width, scale).clamp(-40, 40)
    (exact, taken), found = exponentials(x, given), x.clone()
    sums, shift = kernel.exp_sum(found, shift_of(x, given))
    nearest = exact.to(torch.bfloat16)
    assert (found != nearest).double().mean() < 0.01  # the polynomial's 4e-6 decides a few ties otherwise
    assert ((found.double() - exact).abs() / exact).max() < 2**-8 * 1.01
    assert sums.shape == (rows, 1)
    assert torch.allclose(sums.double(), found.double().sum(1, keepdim=True), rtol=1e-5)
    assert torch.equal(shift, taken)


@needs_compiler
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 8), (7, 1000), (32, 64), (65, 4097)])
@pytest.mark.parametrize("scale", [0.1, 5.0, 25.0])
@pytest.mark.parametrize("given", SHIFTS)
def test_float32_by_columns_is_near_to_the_last_bits(rows, width, scale, given):
    x = numbers(rows, width, scale).clamp(-40, 40).float()
    taken, found = exponentials(x, given)[1], by_columns(x)
    exact = (x - taken).double().exp()  # the difference is rounded to float32
    sums, shift = kernel.exp_sum(found, shift_of(x, given))
    assert ((found.double() - exact).abs() / exact).max() < 3e-7
    assert sums.shape == (rows, 1)
    assert torch.allclose(sums.double(), exact.sum(1, keepdim=True), rtol=1e-6)
    assert torch.equal(shift, taken)


@needs_compiler
def test_equal_numbers_add_up_without_drifting():
    """Each of so many sums is rounded the same way."""
    found = by_columns(torch.full((2, 60_000), 0.1))
    sums, _ = kernel.exp_sum(found, torch.zeros(2, 1))
    assert torch.allclose(sums.double(), found.double().sum(1, keepdim=True), rtol=1e-5)


@needs_compiler
@pytest.mark.parametrize("laid_out", LAYOUTS)
def test_logits_of_any_size(laid_out):
    x = laid_out(torch.tensor([[1e30, 1e30, -1e30], [-1e30, -2e30, -1e30]]))
    sums, shift = kernel.exp_sum(x)
    assert sums.tolist() == [[2.0], [2.0]]
    assert shift[:, 0].tolist() == pytest.approx([1e30, -1e30], rel=1e-2)


@needs_compiler
@pytest.mark.parametrize("laid_out", LAYOUTS)
@pytest.mark.parametrize("given", [None, 0.0])
def test_the_ends_of_the_range(given, laid_out):
    x = laid_out(torch.tensor([[0.0, -200.0, -torch.inf], [0.0, torch.nan, 0.0], [0.0, torch.inf, 0.0]]))
    sums, _ = kernel.exp_sum(x, shift_of(x, given))
    assert x[0].tolist() == [1.0, *[pytest.approx(2.0**-126, rel=1e-6)] * 2]
    assert sums[0].item() == 1.0
    assert torch.isnan(sums[1:]).all()


@needs_compiler
@pytest.mark.parametrize("laid_out", LAYOUTS)
def test_the_threads_share_the_rows(laid_out):
    x = numbers(999, 513, 3.0)
    alone, together, before = laid_out(x), laid_out(x), torch.get_num_threads()
    one = kernel.exp_sum(alone)
    torch.set_num_threads(2)
    try:
        two = kernel.exp_sum(together)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, together)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("given", SHIFTS)
@pytest.mark.parametrize("width", [64, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_a_compiler_pytorch_does_the_same(monkeypatch, width, dtype, given):
    monkeypatch.setattr(kernel, "load_kernel", lambda: None)
    x = numbers(20, width, 1.0).to(dtype)
    if given and dtype != torch.float32:  # then it takes the largest, from which the near ones differ by little
        exact, taken = exponentials(x, None)
    else:
        exact, taken = exponentials(x, given)
    found = by_columns(x) if dtype == torch.float32 and width == 65 else x.clone()
    sums, shift = kernel.exp_sum(found, shift_of(x, given))
    near = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]  # the difference is rounded too
    assert torch.allclose(found.double(), exact, rtol=near)
    assert torch.allclose(sums.double(), exact.sum(1, keepdim=True), rtol=near)
    assert torch.equal(shift, taken)


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "true"])
def test_a_compiler_that_is_absent_or_fails_is_done_without(monkeypatch, compiler):
    monkeypatch.setenv("CC", compiler)
    assert kernel.load_kernel.__wrapped__() is None
    assert kernel.load_block_kernel.__wrapped__("block.c") is None


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """An empty cache folder, and the commands that compiled or linked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    commands, run = [], kernel._run

    def noted(command):
        if "-E" not in command:
            commands.append(command)
        return run(command)

    monkeypatch.setattr(kernel, "_run", noted)
    return commands


def sums_of_ones(library):
    x, sums, shift = torch.zeros(1, 8, dtype=torch.bfloat16), torch.empty(1, 1), torch.zeros(1, 1)
    library.exp_sum(x.data_ptr(), sums.data_ptr(), shift.data_ptr(), 0, 1, 8)
    return sums.item()


@needs_compiler
@pytest.mark.parametrize("there", [None, b"no library"])
def test_a_library_is_compiled_once_and_kept(compiled, tmp_path, monkeypatch, there):
    if there is not None:
        folder = tmp_path / "losscurve" / "compiled"
        folder.mkdir(parents=True)
        monkeypatch.setattr(kernel.hashlib, "sha256", lambda parts: SimpleNamespace(hexdigest=lambda: "name"))
        (folder / "kernel-name.so").write_bytes(there)
    for _ in range(2):
        assert sums_of_ones(kernel.load_kernel.__wrapped__()) == 8
        assert len(compiled) == 2  # compiled and linked
    (kept,) = (tmp_path / "losscurve" / "compiled").iterdir()
    assert ctypes.CDLL(str(kept)).exp_sum


@needs_compiler
def test_another_source_or_flag_is_another_library(compiled, tmp_path, monkeypatch):
    kernel.load_kernel.__wrapped__()
    monkeypatch.setattr(kernel.platform, "machine", lambda: "riscv")
    kernel.load_kernel.__wrapped__()
    changed = tmp_path / "sources"
    changed.mkdir()
    for file in ("kernel.c", "block.h"):
        (changed / file).write_bytes((kernel.SOURCES / file).read_bytes() + b"\n")
    monkeypatch.setattr(kernel, "SOURCES", changed)
    kernel.load_kernel.__wrapped__()
    assert len(list((tmp_path / "losscurve" / "compiled").iterdir())) == 3


@needs_compiler
def test_a_cache_folder_that_cannot_be_written_keeps_nothing(compiled, tmp_path):
    (tmp_path / "losscurve").write_text("a file in the folder's place")
    assert sums_of_ones(kernel.load_kernel.__wrapped__()) == 8
