"""The blocked loss against fp64 autograd over full logits."""

import pytest
import torch

from llm import loss as loss_module
from llm.loss import linear_cross_entropy, plain_cross_entropy
from llm.machine import kernel


def reference(hidden, weight, targets):
    """Loss and gradients by fp64 autograd, with all logits at once."""
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    loss = plain_cross_entropy(h, w, targets)
    loss.backward()
    return loss, h.grad, w.grad


def inputs(n, c, v, scale=1.0):
    torch.manual_seed(n + c + v)
    hidden = torch.randn(n, c, requires_grad=True)
    weight = (torch.randn(v, c) * scale).requires_grad_()
    return hidden, weight, torch.randint(v, (n,))


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def assert_matches_fp64(hidden, weight, targets):
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    expected, hidden_grad, weight_grad = reference(hidden, weight, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert error(hidden.grad, hidden_grad) < 1e-5
    assert error(weight.grad, weight_grad) < 1e-5


@pytest.mark.parametrize(("columns", "safe"), [(1000, 0.0), (1000, 60.0), (10**6, 0.0), (10**6, 60.0)])
@pytest.mark.parametrize("rows", [1, 5, 10**6])
@pytest.mark.parametrize(("n", "c", "v"), [(1, 8, 3), (7, 16, 65), (17, 128, 50257), (33, 4, 1000)])
def test_fp32_matches_fp64_for_any_chunk(monkeypatch, n, c, v, rows, columns, safe):
    """Chunks of rows, blocks of columns, with a shift (above `safe`) and without."""
    monkeypatch.setattr(loss_module, "ROWS_BYTES", rows * 4 * v)
    monkeypatch.setattr(loss_module, "BLOCK_BYTES", 4 * columns)
    monkeypatch.setattr(loss_module, "SAFE", safe)
    hidden, weight, targets = inputs(n, c, v, 0.3)
    assert_matches_fp64(hidden, weight, targets)


def test_one_token_repeated():
    hidden, weight, targets = inputs(50, 8, 11)
    targets.fill_(3)
    assert_matches_fp64(hidden, weight, targets)


@pytest.fixture(params=["compiled", "by PyTorch"])
def exponentials(request, monkeypatch):
    """The two ways to exponentials, where both are there."""
    if request.param == "by PyTorch":
        monkeypatch.setattr(kernel, "load_kernel", lambda: None)
    elif kernel.load_kernel() is None:
        pytest.skip("no C compiler here")


@pytest.mark.usefixtures("exponentials")
@pytest.mark.parametrize("vocab_size", [65, 301])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_close(dtype, vocab_size):
    hidden, weight, targets = inputs(40, 32, vocab_size, 0.3)
    with torch.autocast("cpu", dtype=dtype):
        loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    expected, hidden_grad, weight_grad = reference(hidden, weight, targets)
    assert loss.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=5e-3)
    assert error(hidden.grad, hidden_grad) < 1e-2
    assert error(weight.grad, weight_grad) < 1e-2


def test_float16_holds_the_small_gradients_of_tokens_that_are_no_target():
    """Each is a probability of 1 / V over n tokens, so a number of float16 has few bits for it, or none."""
    hidden, weight, targets = inputs(1024, 16, 20000, 0.02)
    targets %= 10
    with torch.autocast("cpu", dtype=torch.float16):
        linear_cross_entropy(hidden, weight, targets).backward()
    _, _, weight_grad = reference(hidden, weight, targets)
    assert error(weight.grad[10:], weight_grad[10:]) < 1e-2


def test_huge_logits_stay_finite():
    hidden, weight, targets = inputs(20, 16, 40, 1e4)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    expected, _, weight_grad = reference(hidden, weight, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert error(weight.grad, weight_grad) < 1e-4


def test_two_forwards_before_one_backward():
    first, weight, targets = inputs(12, 8, 30)
    second = torch.randn(12, 8, requires_grad=True)
    a, b = (linear_cross_entropy(h, weight, targets) for h in (first, second))
    (a + 2 * b).backward()
    _, grad_a, weight_a = reference(first, weight, targets)
    _, grad_b, weight_b = reference(second, weight, targets)
    assert error(first.grad, grad_a) < 1e-5
    assert error(second.grad, 2 * grad_b) < 1e-5
    assert error(weight.grad, weight_a + 2 * weight_b) < 1e-5


def test_a_gradient_is_nobody_elses_memory():
    hidden, weight, targets = inputs(12, 8, 30)
    linear_cross_entropy(hidden, weight, targets).backward()
    kept = weight.grad.clone(), hidden.grad.clone()
    linear_cross_entropy(torch.randn(12, 8, requires_grad=True), weight.detach().requires_grad_(), targets).backward()
    assert torch.equal(weight.grad, kept[0])
    assert torch.equal(hidden.grad, kept[1])


def test_backward_twice_gives_the_same():
    hidden, weight, targets = inputs(12, 8, 30)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward(retain_graph=True)
    assert torch.equal(weight.grad, 2 * once)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_gradient_is_handed_on_without_a_copy():
    """Its memory becomes `.grad`: a copy of the output matrix's would cost 26 MB at the chapter's size."""
    hidden, weight, targets = inputs(12, 8, 30)
    loss = linear_cross_entropy(hidden, weight, targets)
    made = [g.data_ptr() for g in loss.grad_fn.found]
    loss.backward()
    assert [hidden.grad.data_ptr(), weight.grad.data_ptr()] == made


@pytest.mark.usefixtures("exponentials")
def test_what_is_not_a_number_comes_through():
    hidden, weight, targets = inputs(3, 8, 30)
    for bad in (float("nan"), float("inf")):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            hidden[1, 0] = bad
            assert not torch.isfinite(linear_cross_entropy(hidden, weight, targets))


def test_frozen_weight_or_hidden():
    hidden, weight, targets = inputs(6, 8, 30)
    linear_cross_entropy(hidden, weight.detach(), targets).backward()
    _, hidden_grad, weight_grad = reference(hidden, weight, targets)
    assert error(hidden.grad, hidden_grad) < 1e-5
    linear_cross_entropy(hidden.detach(), weight, targets).backward()
    assert error(weight.grad, weight_grad) < 1e-5
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad


def test_without_gradients_none_is_made(monkeypatch):
    """Evaluation: one product for each block of logits, and no more."""
    hidden, weight, targets = inputs(6, 8, 30)
    products, real = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **kw: products.append(a) or real(*a, **kw))
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets)
    assert len(products) == 1
    assert loss.item() == pytest.approx(linear_cross_entropy(hidden, weight, targets).item(), rel=1e-6)


@pytest.mark.usefixtures("exponentials")
@pytest.mark.parametrize("size", [59.9, 60.1, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_as_large_as_may_be(size, dtype):
    """All of them at plus or minus `size`, below and above where a shift begins."""
    torch.manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(16), dim=0)
    hidden = (direction * torch.tensor([[size], [-size], [0.0]])).requires_grad_()
    weight = (direction * torch.tensor([1.0, -1.0]).repeat(25000)[:, None]).requires_grad_()
    targets = torch.tensor([0, 0, 1])
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    expected, hidden_grad, weight_grad = reference(hidden, weight, targets)
    near = 1e-5 if dtype == torch.float32 else 1e-2
    assert loss.item() == pytest.approx(expected.item(), rel=near)
    assert error(hidden.grad, hidden_grad) < near
    assert error(weight.grad, weight_grad) < near


@pytest.mark.parametrize("scale", [0.1, 3.0, 8.0, 30.0, 1e3])
@pytest.mark.parametrize("offset", [-80.0, 0.0, 80.0])
def test_a_safe_shift_keeps_each_row_within_the_range(scale, offset):
    hidden, weight, _ = inputs(50, 16, 400, scale)
    with torch.no_grad():
        weight[:, 0], hidden[:, 0] = offset / 20, 20.0  # on all logits of a row
        shift = loss_module._safe_shift(hidden, weight)
        logits = hidden.double() @ weight.double().T
    if shift is None:
        assert hidden.norm(dim=1).max() * weight.norm(dim=1).max() > loss_module.SAFE
    else:
        highest = (logits - shift).amax(1)
        assert highest.max() <= loss_module.SAFE
        assert highest.min() >= -loss_module.SAFE


@pytest.mark.usefixtures("exponentials")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shift_that_is_known_beforehand(monkeypatch, dtype):
    """Vectors too long to go without one, of logits that are not large, as of a trained model."""
    hidden, weight, targets = inputs(70, 128, 900, 1.0)
    with torch.no_grad():
        hidden *= 15 / hidden.norm(dim=1, keepdim=True)
        weight *= 6 / weight.norm(dim=1, keepdim=True)
        assert loss_module._safe_shift(hidden, weight).min() > 29
    monkeypatch.setattr(loss_module, "BLOCK_BYTES", 400)
    monkeypatch.setattr(loss_module, "ROWS_BYTES", 30 * 900 * dtype.itemsize)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    expected, hidden_grad, weight_grad = reference(hidden, weight, targets)
    near = 1e-5 if dtype == torch.float32 else 1e-2
    assert loss.item() == pytest.approx(expected.item(), rel=near)
    assert error(hidden.grad, hidden_grad) < near
    assert error(weight.grad, weight_grad) < near
