"""Memorised or learned: every count is compared with a brute-force search, and a run memorises a text."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import flags
from hypothesis import given
from hypothesis import strategies as st

from llm import GPT, Run
from llm.checks import memorised
from llm.checks.memorised import first_places, hashes, longest_seen, run_tokens, share_seen, spread_windows

ids = st.integers(0, 2)  # few, so that there is much to find


@st.composite
def searches(draw):
    """Draw (samples (S, T), tokens (N,), n): small, of few ids, some of them periodic."""
    S, T, N = draw(st.integers(1, 4)), draw(st.integers(1, 12)), draw(st.integers(1, 60))
    samples = draw(st.lists(ids, min_size=S * T, max_size=S * T))
    period = draw(st.lists(ids, min_size=1, max_size=N))
    return np.array(samples).reshape(S, T), np.resize(np.array(period, "<u2"), N), draw(st.integers(1, 9))


def place_of(window, tokens):
    """Return where `window` first occurs in `tokens`, or -1, by brute force."""
    places = [p for p in range(len(tokens) - len(window) + 1) if tokens[p : p + len(window)].tolist() == list(window)]
    return places[0] if places else -1


def longest_length(samples, tokens):
    windows = [row[i:j] for row in samples for i in range(len(row)) for j in range(i + 1, len(row) + 1)]
    return max((len(window) for window in windows if place_of(window, tokens) >= 0), default=0)


@pytest.fixture(params=["good hashes", "hashes that collide"])
def small_pieces(request, monkeypatch):
    """Cut token files into many pieces; with colliding hashes (two values), only exact comparison separates windows."""
    monkeypatch.setattr(memorised, "PIECE", 7)
    if request.param != "good hashes":
        top = np.uint64(63)
        monkeypatch.setattr(memorised, "hashes", lambda ids, n: hashes(ids, n) >> top << top)


@pytest.mark.usefixtures("small_pieces")
class TestAgainstBruteForce:
    """Small inputs, in many pieces."""

    @given(searches())
    def test_places_and_shares(self, search):
        samples, tokens, n = search
        windows = [row[i : i + n] for row in samples for i in range(len(row) - n + 1)]
        expected = [place_of(window, tokens) for window in windows]
        assert first_places(samples, tokens, n).reshape(-1).tolist() == expected
        share = share_seen(samples, tokens, n)
        assert share == (pytest.approx(np.mean([p >= 0 for p in expected])) if windows else None)

    @given(searches())
    def test_the_longest_passage(self, search):
        samples, tokens, _ = search
        length, sample, start, place = longest_seen(samples, tokens)
        assert length == longest_length(samples, tokens)
        assert samples[sample, start : start + length].tolist() == tokens[place : place + length].tolist()


@pytest.mark.parametrize("place", [0, 1000 - 9, 1000, 2**18 - 20, 5 * 10**5 - 37])
def test_a_planted_passage_is_found_with_its_length_and_place(place, tmp_path):
    draw = np.random.default_rng(place)
    tokens = draw.integers(0, 50000, 5 * 10**5).astype("<u2")
    samples = draw.integers(50000, 60000, (3, 80))  # ids that do not occur in the tokens
    samples[1, 30:67] = tokens[place : place + 37]
    tokens.tofile(tmp_path / "train.bin")
    mapped = np.memmap(tmp_path / "train.bin", dtype="<u2", mode="r")
    assert longest_seen(samples, mapped) == (37, 1, 30, place)
    assert share_seen(samples, mapped, 8) == (37 - 7) / (3 * 73)
    assert share_seen(samples, mapped, 37) == 1 / (3 * 44)
    assert share_seen(samples, mapped, 38) == 0


def test_no_window_joins_two_samples_and_large_ids_count():
    tokens = np.arange(70000, 70020, dtype="<u4")
    samples = tokens.reshape(2, 10)
    assert longest_seen(samples, tokens) == (10, 0, 0, 0)
    assert share_seen(samples, tokens, 11) is None
    assert first_places(samples, tokens, 10).tolist() == [[0], [10]]
    assert share_seen(samples - 2**16, tokens, 1) == 0  # ids are not cut to 16 bits
    assert longest_seen(np.zeros((2, 3), int), tokens) == (0, 0, 0, 0)


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_hashes_of_different_windows_differ(n):
    windows = np.stack(np.meshgrid(*[np.arange(4)] * n), -1).reshape(-1, n)  # all there are of four ids
    assert len(np.unique(hashes(windows, n))) == 4**n
    assert len(np.unique(hashes(windows, n) >> memorised.SHIFT)) > 0.97 * 4**n


def test_the_validation_windows_do_not_overlap_and_cover_the_split():
    tokens = np.arange(100)
    assert spread_windows(tokens, 3, 20)[:, 0].tolist() == [0, 20, 60]
    assert spread_windows(tokens, 9, 20).shape == (5, 20)
    assert spread_windows(tokens, 9, 200).tolist() == [tokens.tolist()]


SENTENCE = "the cat sat on a mat, and nobody knew why it had not gone out.\n"


@pytest.fixture
def run(here, losscurve):
    """Train a run on one repeated sentence until it memorises it; the validation split has other sentences."""
    Path("text.txt").write_text(SENTENCE * 90 + SENTENCE[::-1] * 10, encoding="utf-8")
    numbers = {"max_steps": 250, "eval_every": 250, "n_embd": 48}
    code, _, err = losscurve(f"train --text text.txt --data_dir data {flags(**numbers)}")
    assert code == 0, err
    return Run.open("checkpoints")


COMMAND = "memorised checkpoints --num_samples 4 --max_new_tokens 60 --temperatures 0.5,1"


def shares(out):
    """Return the shares of the temperatures and of the validation text, in percent."""
    return [float(line.split("|")[1].split("%")[0]) for line in out.splitlines() if "8-grams seen" in line]


def test_a_memorised_text_has_a_larger_share_than_one_never_seen(run, losscurve):
    code, out, err = losscurve(COMMAND)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"4 samples of 60 tokens, searched for in {90 * len(SENTENCE):,} training tokens"
    cool, warm, usual = shares(out)
    assert cool > 80 > 10 > usual
    assert cool >= warm
    length, place = (int(x) for x in lines[1].split("longest ")[1].split(": ")[0].split(" tokens, at training token "))
    text = (SENTENCE * 2)[place % len(SENTENCE) :][:length]
    assert length >= 30
    assert lines[1].endswith(f": {text!r}")
    assert lines[-1].startswith("seen: ")
    assert losscurve(COMMAND)[1] == out  # a seed of its own: the same every time
    assert losscurve(COMMAND + " --seed 5")[1] != out
    torch.manual_seed(0)
    torch.save(GPT(run.config.model).state_dict(), "checkpoints/best.pt")  # untrained
    untrained, _, the_same = shares(losscurve(COMMAND + " --weights best")[1])
    assert untrained == 0
    assert the_same == usual


def test_samples_too_short_and_missing_data_are_reported(run, losscurve):
    code, out, _ = losscurve("memorised --num_samples 2 --max_new_tokens 7 --temperatures 0")
    assert code == 0
    assert out.count("too short for 8-grams | longest ") == 2
    Path("data").rename("moved")
    code, out, err = losscurve("memorised")
    assert (code, out) == (2, "")
    assert err == "error: data: the run's token files are not there (seen from here); say where by --data_dir\n"
    assert losscurve("memorised --data_dir moved --num_samples 1 --max_new_tokens 9")[0] == 0
    assert losscurve("prepare text.txt --data_dir other --tokenizer char --val_fraction 0.2")[0] == 0
    code, _, err = losscurve("memorised --data_dir other")
    assert (code, err) == (2, "error: other: not the data this run was trained on; give the right --data_dir\n")
    Path("checkpoints/env.json").unlink()
    assert run_tokens(run, "other").folder == Path("other")


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("--temperatures 0.5,hot", "temperatures: 'hot' is not a temperature; expected numbers such as 0.5,0.8,1.0"),
        ("--temperatures -1", "'-1' is not a temperature"),
        ("--temperatures nan", "'nan' is not a temperature"),
        ("--num_samples 0", "num_samples = 0: expected 1 or more"),
        ("--max_new_tokens 0", "max_new_tokens = 0: expected 1 or more"),
        ("nowhere", "nowhere: no run here"),
        ("--weight best", "did you mean --weights?"),
    ],
)
def test_a_wrong_flag_is_an_error_of_one_line(here, losscurve, mistake, words):
    code, out, err = losscurve(f"memorised {mistake}")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert words in err


def test_tokens_without_a_tokenizer_are_printed_as_ids(here, losscurve):
    Path("data").mkdir()
    np.resize(np.arange(300), 600).astype("<u2").tofile("data/train.bin")
    np.full(50, 299, dtype="<u2").tofile("data/val.bin")
    small = flags(max_steps=2, eval_every=2, vocab_size=300, warmup_steps=0).replace("--tokenizer char", "")
    assert losscurve(f"train --data_dir data {small}")[0] == 0
    code, out, err = losscurve("memorised --num_samples 2 --max_new_tokens 30 --temperatures 1")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[2] == "validation text     |   0.0% of 8-grams seen | longest 1 tokens, at training token 299: 299"
    assert lines[3] == "(the validation text is short: 1 x 30 tokens of it)"
