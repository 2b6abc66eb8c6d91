"""The metrics of a run: rows survive, an incomplete last line is ignored, damaged lines are named."""

import contextlib
import json
import math
import types

import pytest
from conftest import append

from llm.errors import UserError
from llm.record import metrics
from llm.record.metrics import Record, best, overfits_since, read_record
from llm.storage import files


def record(*evaluations, train=()):
    """Rows of evaluations every 10 steps and of training losses, as (step, loss)."""
    rows = [{"step": 10 * i, "split": "val", "loss": loss} for i, loss in enumerate(evaluations)]
    return rows + [{"step": step, "split": "train", "loss": loss} for step, loss in train]


def test_rows_come_back_with_every_key(tmp_path):
    append(tmp_path, step=0, split="val", loss=10.8, bits_per_byte=None, lr=0.0)
    append(tmp_path, step=10, split="train", loss=9.5, grad_norm=math.inf, tokens_per_second=math.nan)
    first, second = read_record(tmp_path)
    assert first["loss"] == 10.8
    assert first["tokens"] is None
    assert second["grad_norm"] is second["tokens_per_second"] is None
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.count("\n") == 2
    assert "NaN" not in text
    assert "Infinity" not in text


def test_an_incomplete_last_line_is_ignored_and_cut(tmp_path):
    for step in range(0, 50, 10):
        append(tmp_path, step=step, split="train", loss=1.0 * step)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for torn in (b'{"step": 50, "spl', b"\x00\x00\x00", b"\xff", b"{", b"5"):
        path.write_bytes(whole + torn)
        assert [row["step"] for row in read_record(tmp_path)] == [0, 10, 20, 30, 40]
    Record(tmp_path).cut(30)
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:4])
    append(tmp_path, step=40, split="train", loss=2.0)
    assert [row["step"] for row in read_record(tmp_path)] == [0, 10, 20, 30, 40]
    Record(tmp_path).cut(-1)
    assert read_record(tmp_path) == []
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_every_prefix_of_a_record_is_readable(tmp_path):
    for step in range(3):
        append(tmp_path, step=step, split="val", loss=0.5)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        steps = [row["step"] for row in read_record(tmp_path)]
        assert steps == list(range(len(steps)))
        assert len(steps) >= whole[:size].count(b"\n")


@pytest.mark.parametrize(
    "line",
    [
        "{", "[1]", "5", "null", '{"split": "val"}', '{"step": -1, "split": "val"}', '{"step": true, "split": "val"}',
        '{"step": 1.5, "split": "val"}', '{"step": 1, "split": "test"}', '{"step": 1, "split": "val", "loss": "low"}',
        '{"step": 1, "split": "val", "loss": 1e999}', '{"step": 1, "split": "val", "lr": [1]}', "[" * 100_000,
        '{"step": 1, "split": ["val"]}', '{"step": 1, "split": "val", "loss": ' + "9" * 400 + "}",
        '{"step": ' + "9" * 5000 + "}",
    ],
)  # fmt: skip
def test_damaged_line_is_named(tmp_path, line):
    append(tmp_path, step=0, split="val", loss=1.0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(line + "\n")
    for read in (read_record, lambda folder: Record(folder).cut(5)):
        with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged") as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)


def test_foreign_nan_is_null(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('\n{"step": 1, "split": "val", "loss": NaN}\n')
    assert read_record(tmp_path)[0]["loss"] is None


def test_missing_run_and_full_disk(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no run here"):
        read_record(tmp_path / "nowhere")
    Record(tmp_path).cut(5)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        read_record(tmp_path)


def test_rows_that_a_full_disk_refused_are_written_with_the_next(tmp_path, monkeypatch):
    written = Record(tmp_path)
    written.add(step=1, split="train", loss=1.0)
    written.catch_up()
    plain_open = open

    @contextlib.contextmanager
    def full(*args, **kwargs):
        with plain_open(*args, **kwargs) as file:
            short = types.SimpleNamespace(**{name: getattr(file, name) for name in ("tell", "truncate", "fileno")})
            short.write = lambda content: file.write(content[:5])
            yield short

    monkeypatch.setattr(files, "open", full, raising=False)
    for step in (2, 3):
        written.add(step=step, split="train", loss=1.0)
        with pytest.raises(OSError, match="No space left"):
            written.catch_up()
        written.flush(1)  # the row of step 1 is there
        with pytest.raises(OSError, match="rows of the run"):
            written.flush(2)
        assert [row["step"] for row in read_record(tmp_path)] == [1]
    monkeypatch.undo()
    written.add(step=4, split="train", loss=1.0)
    written.catch_up()
    written.flush(4)
    written.add(step=5, split="train", loss=1.0)  # waits, but the four before it are on the disk
    written.flush(4)
    assert [row["step"] for row in read_record(tmp_path)] == [1, 2, 3, 4]


def test_a_spike_is_a_leap_out_of_what_came_before():
    noisy = [4.0 + 0.05 * (-1) ** i for i in range(50)]
    assert metrics.is_spike(4.8, noisy)
    assert not metrics.is_spike(4.4, noisy)  # less than half a nat
    assert not metrics.is_spike(0.0, noisy)  # down
    assert not metrics.is_spike(9.0, noisy[:10])  # too little to judge by
    wide = [4.0 + 0.5 * (-1) ** i for i in range(50)]
    assert not metrics.is_spike(6.0, wide)
    assert metrics.is_spike(9.0, wide)
    assert metrics.is_spike(5.0, [*noisy[:-3], 9.0, 9.0, 9.0])  # earlier leaps do not hide this one
    falling = [10 - 0.1 * i for i in range(50)]
    assert not metrics.is_spike(5.1, falling)


def test_an_interrupted_cut_leaves_the_record_complete(tmp_path, monkeypatch):
    for step in range(5):
        append(tmp_path, step=step, split="train", loss=1.0)

    def fails(*_):
        raise OSError

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError):  # noqa: PT011
        Record(tmp_path).cut(2)
    assert len(read_record(tmp_path)) == 5


def test_best_is_the_first_of_the_lowest():
    assert best([]) is None
    assert best(record(None, None, train=[(0, 1.0)])) is None
    assert best(record(3.0, 2.0, None, 2.0, 2.5, train=[(5, 0.1)]))["step"] == 10


@pytest.mark.parametrize(
    ("evaluations", "since"),
    [
        ((), None),
        ((5.0,), None),
        ((5.0, 4.0, 3.0, 2.0), None),
        ((5.0, 4.0, 4.5), None),  # one later evaluation is too few
        ((5.0, 4.0, 4.02, 4.03), None),  # less than 1 % up
        ((5.0, 4.0, 4.02, 4.0401), 10),
        ((5.0, 4.0, 4.5, 4.01), None),  # up and back again
        ((0.5, 0.1, 0.105, 0.109), None),  # less than 0.01 nats up
        ((0.5, 0.1, 0.105, 0.111), 10),
        ((5.0, 4.0, None, 4.5, 4.5), 10),
    ],
)
def test_overfits_since_by_validation_alone(evaluations, since):
    assert overfits_since(record(*evaluations)) == since


def test_a_run_whose_training_loss_rises_too_diverges():
    falling = [(step, 5 - step / 20) for step in range(0, 41, 2)]
    rising = [(step, 5 + (step - 15) / 20) for step in range(0, 41, 2)]
    assert overfits_since(record(5.0, 4.0, 4.5, 5.0, train=falling)) == 10
    assert overfits_since(record(5.0, 4.0, 4.5, 5.0, train=rising)) is None


def test_what_is_written_is_the_contract(tmp_path):
    values = {"step": 1, "split": "val", **dict.fromkeys(metrics.NUMBERS, 1.5)}
    append(tmp_path, **values)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == values == read_record(tmp_path)[0]


def test_a_record_of_an_earlier_version_is_read_without_its_mfu(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "split": "train", "loss": 2.5, "mfu": 0.57}\n')
    (row,) = read_record(tmp_path)
    assert (row["loss"], row["matmul_utilisation"]) == (2.5, None)
    Record(tmp_path).cut(10)
    assert len(read_record(tmp_path)) == 1
