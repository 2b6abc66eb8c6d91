"""A run that learns from teachers too: the loss against PyTorch's, and all that a run with teachers goes through."""

import contextlib
import json
import re
import shlex
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, config_for, flags, trained, words
from saved_runs import same_bits
from test_autopilot import machine

from llm import fit
from llm import loss as loss_module
from llm.arch import make_model
from llm.checks.rehearsal import Rehearsal
from llm.checks.verify import verify
from llm.commands.main import main
from llm.commands.train_time import train_all
from llm.config import GPTConfig, TrainConfig, from_settings, read_toml
from llm.data import batch_at, starts_at
from llm.errors import UserError
from llm.loss import Taught, linear_cross_entropy
from llm.plan import proposal, rule, text_facts, timing
from llm.plan.arithmetic import MEASURED_SHAPE_BYTES, memory
from llm.plan.prediction import loss
from llm.record.metrics import read_record
from llm.start.new_run import new_run
from llm.start.predict import predict
from llm.start.resume_run import resume_run
from llm.storage.checkpoint import load_state
from llm.train import train
from llm.training import predictions
from llm.weights import run_config

OTHER_SHAPE = {"n_layer": 1, "n_embd": 8, "max_steps": 8, "seed": 3}
LARGE_SHAPE = GPTConfig(vocab_size=12, n_layer=2, n_embd=512, n_head=8, block_size=16)


def small_flags(*without):
    """The small settings as flags, without some of them."""
    return " ".join(f"--{name} {value}" for name, value in SMALL.items() if name not in without)


def logits_and_taught(n, c, v, k, share, seed=0):
    """The input of the loss: of a model, and the k most probable tokens of a teacher."""
    draw = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(*size, generator=draw).requires_grad_() for size in ((n, c), (v, c)))
    most = torch.softmax(2 * torch.randn(n, v, generator=draw), 1).topk(k)
    return hidden, weight, torch.randint(v, (n,), generator=draw), Taught(most.indices, most.values, share)


def reference(hidden, weight, targets, taught):
    """PyTorch's loss of the text, and its gradients for the mixed targets.

    What the teacher leaves to tokens that are not known is divided as the model divides it.
    """
    logits = hidden.double() @ weight.double().T
    theirs = torch.softmax(logits.detach(), 1).scatter(1, taught.ids, 0)
    left = 1 - taught.probabilities.double().sum(1, keepdim=True)
    theirs *= left.clamp(min=0) / theirs.sum(1, keepdim=True).clamp(min=1e-300)
    theirs.scatter_(1, taught.ids, taught.probabilities.double())
    mixed = taught.share * theirs + (1 - taught.share) * F.one_hot(targets, len(weight))
    found = torch.autograd.grad(F.cross_entropy(logits, mixed), (hidden, weight))
    return F.cross_entropy(logits, targets).item(), found


@pytest.mark.parametrize(("n", "c", "v", "k"), [(1, 3, 2, 1), (7, 16, 50, 50), (300, 32, 1024, 64), (300, 32, 1024, 3)])
@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize("rows", [1, 10**9])
def test_the_value_is_the_texts_and_the_gradient_the_mixtures(monkeypatch, n, c, v, k, share, rows):
    monkeypatch.setattr(loss_module, "ROWS_BYTES", rows)
    hidden, weight, targets, taught = logits_and_taught(n, c, v, k, share)
    expected, gradients = reference(hidden, weight, targets, taught)
    found = linear_cross_entropy(hidden, weight, targets, taught)
    assert found.item() == pytest.approx(expected, abs=1e-5)
    (3 * found).backward(retain_graph=True)
    for ours, gradient in zip((hidden.grad, weight.grad), gradients, strict=True):
        assert torch.allclose(ours, 3 * gradient, atol=1e-6)
    found.backward()  # again, for it may be
    assert torch.allclose(hidden.grad, 4 * gradients[0], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_low_precision_it_is_close(dtype):
    hidden, weight, targets, taught = logits_and_taught(200, 32, 512, 64, 0.5)
    expected, gradients = reference(hidden, weight, targets, taught)
    with torch.autocast("cpu", dtype):
        found = linear_cross_entropy(hidden, weight, targets, taught)
    assert (found.dtype, found.item()) == (torch.float32, pytest.approx(expected, rel=2e-3))
    found.backward()
    for ours, gradient in zip((hidden.grad, weight.grad), gradients, strict=True):
        assert torch.linalg.vector_norm(ours - gradient) < 0.02 * torch.linalg.vector_norm(gradient)


def test_float16_sums_more_than_it_can_hold():
    """40,000 rows that are alike: their sum is above 65,504, which float16 does not have."""
    hidden, weight = torch.full((40_000, 4), 16.0), torch.zeros(8, 4)
    hidden.requires_grad_()
    weight.requires_grad_()
    targets = torch.arange(40_000) % 2
    with torch.autocast("cpu", torch.float16):
        even = Taught(torch.arange(8).expand(40_000, 8), torch.full((40_000, 8), 1 / 8), 0.5)
        linear_cross_entropy(hidden, weight, targets, even).backward()
    assert torch.allclose(weight.grad[:, 0], torch.tensor([-3.0, -3.0] + 6 * [1.0]), atol=1e-2)


def test_what_predicts_as_its_teacher_has_nothing_to_learn():
    """All of the target is the teacher's, of which only the most probable tokens are known: no gradient."""
    hidden, weight, targets, _ = logits_and_taught(50, 16, 300, 1, 1.0)
    most = torch.softmax(hidden @ weight.T, 1).detach().topk(20)
    linear_cross_entropy(hidden, weight, targets, Taught(most.indices, most.values, 1.0)).backward()
    assert max(hidden.grad.abs().max(), weight.grad.abs().max()) < 1e-6


@pytest.mark.parametrize(("count", "block_size"), [(17, 16), (18, 16), (57, 16), (200, 16), (90, 5), (30, 1)])
def test_every_place_is_predicted_from_half_a_window_before_it(here, monkeypatch, count, block_size):
    """The mean of two models, in order, against their own logits of one of the contexts that are long enough."""
    monkeypatch.setattr(predictions, "KEPT", 5)
    config = config_for(here, teacher="first", block_size=block_size, vocab_size=30)
    shapes = [from_settings({"n_embd": width}, config).model for width in (8, 16)]
    teachers = [make_model(shape).eval() for shape in shapes]
    tokens = np.random.default_rng(0).integers(0, 30, count).astype(np.uint16)
    rows = np.concatenate(list(predict(config, teachers, tokens, torch.float32)))
    assert (rows.shape, rows.nbytes) == ((count - 1,), predictions.size_of(config, count))
    for place in range(count - 1):
        found = []
        for start in range(max(0, place - block_size + 1), max(0, place - block_size // 2) + 1):
            x = torch.from_numpy(tokens[start : place + 1].astype(np.int64))[None]
            with torch.no_grad():
                both = torch.stack([torch.softmax(teacher(x)[0][0, -1], 0) for teacher in teachers]).mean(0)
            most = both.topk(5)
            found.append((most.indices.tolist(), most.values.half().numpy()))
        assert any(
            rows[place]["ids"].tolist() == ids and np.allclose(rows[place]["probabilities"], values, atol=2e-4)
            for ids, values in found
        ), place
    rows.tofile("predictions.bin")
    starts = np.array([0, (count - block_size) // 2, count - block_size - 1])
    expected = np.stack([rows[start : start + block_size] for start in starts])
    assert np.array_equal(predictions._read(Path("predictions.bin"), config, starts), expected)


def in_full(rows, vocab_size):
    """Predictions of all tokens as probabilities (..., V)."""
    found = np.zeros((*rows.shape, vocab_size), np.float32)
    np.put_along_axis(found, rows["ids"].astype(np.int64), rows["probabilities"].astype(np.float32), -1)
    return torch.from_numpy(found)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("more", [{}, {"gradient_accumulation_steps": 2, "batch_size": 2}])  # compiled: test_train.py
def test_a_step_is_that_of_a_plain_loop(here, arch, more):
    """Two steps of AdamW on the cross-entropy with PyTorch's mixed targets end at the same weights."""
    names = ["first", "other"]
    trained(config_for(here, out_dir="first", arch=arch, **OTHER_SHAPE, dropout=0.5))
    trained(config_for(here, out_dir="other", arch=arch, max_steps=8, seed=4))
    changes = {"max_steps": 2, "warmup_steps": 0, "schedule": "constant", "min_lr": None, "max_lr": 1e-3}
    config = config_for(here, out_dir="second", teacher=names, teacher_share=0.3, arch=arch, **changes | more)
    with new_run(config) as run:
        model, data = run.parts.model, run.parts.data
        torch.manual_seed(config.seed)
        plain = type(model)(run.parts.config.model)
        list(train(run))
    rows = np.fromfile("second/teacher-predictions/predictions.bin", predictions.row_type(12))
    optimizer = torch.optim.AdamW(plain.parameters(), 1e-3, (config.beta1, config.beta2), weight_decay=0.01)
    for step in range(2):
        batch = batch_at(data.train, config.seed, step, 4, 16)
        x, y = torch.from_numpy(batch.x), torch.from_numpy(batch.y)
        starts = starts_at(len(data.train), config.seed, step, 4, 16)
        assert np.array_equal([data.train[start : start + 16] for start in starts], batch.x)
        taught = torch.stack([in_full(rows[start : start + 16], 12) for start in starts])
        logits = plain(x)[0]
        mixed = 0.7 * F.one_hot(y, logits.size(-1)) + 0.3 * taught
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), mixed.flatten(0, 1)).backward()
        optimizer.step()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5), name


@pytest.mark.parametrize(
    "settings", [{"dropout": 0.3, "arch": "llama", "optimizer": "muon"}, {"dtype": "bfloat16"}, {"dtype": "float16"}]
)
def test_a_resume_needs_neither_the_teachers_folder_nor_another_step(here, settings):
    trained(config_for(here, out_dir="first", **OTHER_SHAPE))
    trained(config_for(here, out_dir="other", max_steps=8))
    config = config_for(here, out_dir="whole", teacher=["first", "other"], **settings)
    trained(config)
    with new_run(from_settings({"out_dir": "parts"}, config)) as run:
        run.stop = lambda: run.progress.step == 5
        list(train(run))
    shutil.rmtree("first")
    shutil.rmtree("other")
    in_full = [str(here / name) for name in ("first", "other")]
    with pytest.raises(UserError, match="teacher was"), resume_run(Path("parts"), {"teacher": in_full[:1]}):
        pass
    with resume_run(Path("parts"), {"teacher": in_full, "out_dir": "parts"}) as run:
        list(train(run))
    (whole, _), (parts, _) = (load_state(Path(name) / "step-000012") for name in ("whole", "parts"))
    same_bits(whole, parts)
    assert all(finding.good is not False for finding in verify(Path("parts")))


def test_the_text_and_its_tokens_are_the_teachers_unless_another_is_given(here, losscurve):
    bpe = SMALL | {"tokenizer": "bpe", "vocab_size": 300}
    assert losscurve(f"train --text text.txt --out_dir first {flags(**bpe)}")[0] == 0
    small = SMALL | {"tokenizer": "auto", "max_steps": 4}
    code, out, err = losscurve(f"train --teacher first --out_dir second {flags(**small)}")
    assert (code, "80% of each target is what the teacher predicts: first" in out) == (0, True), err
    assert run_config(Path("second")).data_dir == run_config(Path("first")).data_dir == "data/text-bpe300"
    assert (
        losscurve("report second --format md --out second.md")[0]
        == losscurve("report second --out second.html")[0]
        == 0
    )
    assert "and on what first predicts of it" in Path("second.md").read_text(encoding="utf-8")
    assert "and on what <bdi>first</bdi> predicts of it" in Path("second.html").read_text(encoding="utf-8")
    assert losscurve(f"train --text text.txt --teacher first --out_dir third {flags(**small)}")[0] == 0
    assert run_config(Path("third")).data_dir == "data/text-bpe300"
    assert (
        losscurve(f"train --teacher first --data_dir {Path('data/text-bpe300')} --out_dir again {flags(**small)}")[0]
        == 0
    )
    Path("other.txt").write_text(words(700, seed=9), encoding="utf-8")
    assert losscurve(f"train --text other.txt --teacher first --out_dir fourth {flags(**small)}")[0] == 0
    assert run_config(Path("fourth")).data_dir == "data/other-for-first"
    tokenizers = [json.loads(Path(run, "tokenizer.json").read_text(encoding="utf-8")) for run in ("first", "fourth")]
    assert tokenizers[0] == tokenizers[1]
    code, out, err = losscurve("plan --text other.txt --teacher first --block_size 16 --json --data_dir elsewhere")
    assert (code, json.loads(out)["parameters"]["head"] if code == 0 else err) == (0, 300 * TrainConfig().model.n_embd)
    shutil.rmtree("data/text-bpe300")
    code, _, err = losscurve(f"train --teacher first --out_dir fifth {flags(**small)}")
    assert (code, "token files are not there" in err and "--data_dir" in err) == (2, True), err


def test_tokens_that_were_chosen_by_themselves(here, losscurve):
    """A run without a --tokenizer records "auto"; its teacher's kind is the same."""
    small = small_flags("tokenizer")
    assert losscurve("prepare text.txt --tokenizer char --data_dir data/text")[0] == 0
    assert losscurve(f"train --data_dir data/text {small} --out_dir first")[0] == 0
    assert losscurve(f"train --text text.txt --teacher first {small} --out_dir second")[0] == 0
    assert run_config(Path("second")).data_dir == "data/text"


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A folder with the run `first`, runs with other tokens or another block size, and the tokens of another text."""
    folder = tmp_path_factory.mktemp("several")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("text.txt").write_text(words(900), encoding="utf-8")
        trained(config_for(folder, out_dir="first", **OTHER_SHAPE))
        trained(config_for(folder, out_dir="shorter", block_size=8, **OTHER_SHAPE))
        trained(config_for(folder, out_dir="bytes", data_dir="tokens", **OTHER_SHAPE | {"tokenizer": "byte"}))
        Path("twelve.txt").write_text("quick brown\n" * 90, encoding="utf-8")
        twelve = {"text": "twelve.txt", "data_dir": "twelve", "tokenizer": "char"}
        trained(config_for(folder, out_dir="letters", **OTHER_SHAPE | twelve))
        assert run_config(Path("letters")).model.vocab_size == run_config(Path("first")).model.vocab_size
        Path("other.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40, encoding="utf-8")
        assert main(["prepare", "other.txt", "--data_dir", "other", "--tokenizer", "char"]) == 0
    return folder


@pytest.fixture
def several_runs(several, monkeypatch):
    monkeypatch.chdir(several)
    return several


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("--teacher nowhere", "nowhere: no such file or folder"),
        ("--teacher_share 0.3", "teacher_share = 0.3: there is no teacher; leave it out, or give --teacher RUN"),
        ("--teacher first --teacher_share 0", "teacher_share = 0.0: expected"),
        ("--teacher first --block_size 17", "block_size = 17: the teacher first sees 16 tokens; give --block_size 16"),
        ("--teacher first --tokenizer byte", "the weights of first know char tokens; leave it out"),
        ("--teacher first --vocab_size 99", "vocab_size = 99: the teacher first has 12 tokens; leave it out"),
        ("--teacher first --out_dir first --overwrite", "teacher = first: is in the run folder first; choose another"),
        ("--teacher first/model.pt --out_dir first/.. --overwrite", "is in the run folder first/.."),
        ("--teacher first --data_dir other", "its tokens are not those that first was trained on"),
        ("--teacher first bytes", "teacher = bytes: has other tokens than first; leave one of the two out"),
        ("--teacher first letters", "teacher = letters: has other tokens than first; leave one of the two out"),
        ("--teacher first second/model.pt --overwrite", "second/model.pt: no such file"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(several_runs, losscurve, typed, told):
    small = small_flags("tokenizer", *(["block_size"] if "block_size" in typed else []))
    where = "" if "out_dir" in typed else "--out_dir second"
    before = sorted(several_runs.rglob("*"))
    code, _, err = losscurve(f"train {small} {where} {typed}")
    assert (code, told in err, sorted(several_runs.rglob("*"))) == (2, True, before), err


def test_a_fork_has_the_teacher_of_its_run(here, losscurve):
    trained(config_for(here, out_dir="first", **OTHER_SHAPE))
    trained(config_for(here, out_dir="second", teacher="first", keep=9))
    shutil.rmtree("first")
    code, _, err = losscurve("fork second --at 8")
    assert code == 0, err
    ours, theirs = (load_state(Path(folder, "step-000012"))[0] for folder in ("second", "second-at-8"))
    same_bits(ours, theirs)
    code, _, err = losscurve("fork second --at 8 --teacher other --out_dir third")
    assert (code, "a fork learns from the teachers of its run" in err) == (2, True)
    assert losscurve("fork second --at 8 --teacher_share 0.9 --out_dir third")[0] == 0


def test_a_damaged_teacher_is_said_and_a_new_run_takes_the_folder(here, losscurve):
    trained(config_for(here, out_dir="first", **OTHER_SHAPE))
    config = config_for(here, out_dir="second", teacher="first")
    with new_run(config) as run:
        run.stop = lambda: run.progress.step == 5
        list(train(run))
    path = Path("second/teacher-predictions/predictions.bin")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert [str(finding.path) for finding in verify(Path("second")) if finding.good is False] == [
        "second/teacher-predictions"
    ]
    code, _, err = losscurve("train --resume --out_dir second")
    assert (code, "second/teacher-predictions/predictions.bin" in err) == (2, True), err
    trained(config, overwrite=True)
    assert all(finding.good for finding in verify(Path("second")))
    trained(from_settings({"teacher": ()}, config), overwrite=True)
    assert not Path("second/teacher-predictions").exists()


def test_an_earlier_run_stays_until_the_teachers_have_predicted(here, losscurve, monkeypatch):
    trained(config_for(here, out_dir="first", **OTHER_SHAPE))
    config = config_for(here, out_dir="second", teacher="first")

    def interrupted(*given):
        yield next(predict(*given))
        raise KeyboardInterrupt

    def interrupt():
        with monkeypatch.context() as patched:
            patched.setattr("llm.start.predict.predict", interrupted)
            with pytest.raises(KeyboardInterrupt), new_run(config, overwrite=True):
                pass

    interrupt()
    assert [path.name for path in Path("second").iterdir()] == [".lock"]
    trained(config)
    before = {path: path.read_bytes() for path in Path("second").rglob("*") if path.is_file()}
    interrupt()
    assert {path: path.read_bytes() for path in Path("second").rglob("*") if path.is_file()} == before
    path = Path("second/teacher-predictions/predictions.bin")
    path.write_bytes(path.read_bytes()[:-1])
    for command in ("train --resume --out_dir second --max_steps 20", "fork second --at 12 --max_steps 20"):
        code, _, err = losscurve(command)
        assert (code, "predictions.bin: changed since it was written" in err) == (2, True), err
    shutil.rmtree(path.parent)
    for command in ("train --resume --out_dir second --max_steps 20", "fork second --at 12 --max_steps 20"):
        code, _, err = losscurve(command)
        assert (code, "second/teacher-predictions: missing; copy it back" in err) == (2, True), err
    assert not Path("second-at-12").exists()


def test_a_large_vocabulary_has_wider_ids():
    assert [predictions.row_type(size)["ids"].base for size in (2**16, 2**16 + 1)] == [np.dtype("<u2"), np.dtype("<u4")]


def test_the_seconds_of_the_teachers_are_the_runs_but_not_its_steps(here, monkeypatch):
    trained(config_for(here, out_dir="first", **OTHER_SHAPE))
    monkeypatch.setattr("llm.start.predict.predict", lambda *given: time.sleep(1) or predict(*given))
    run, _ = trained(config_for(here, out_dir="second", teacher="first"))
    seconds = [row["seconds"] for row in read_record(Path("second"))]
    assert 1 <= run.progress.predicting < 9
    assert round(run.progress.predicting, 3) == seconds[0] < seconds[-1]
    assert run.stepping_seconds < run.seconds - 1


def test_plans_and_choices_count_the_teacher(here, losscurve):
    trained(config_for(here, out_dir="first", **OTHER_SHAPE))
    small = small_flags("tokenizer")
    plans = []
    for teacher in ("--data_dir data", "--teacher first"):
        code, out, err = losscurve(f"plan {small} {teacher} --json")
        assert code == 0, err
        plans.append(json.loads(out))
    alone, taught = plans
    assert taught["memory"].keys() - alone["memory"].keys() == {"teachers"}
    assert taught["disk"]["what the teachers predict"] == (taught["text_tokens"] - 1) * 12 * 4
    assert taught["run_flops"] == alone["run_flops"]
    assert taught["seconds"]["teachers"] > 0
    config = config_for(here, vocab_size=12)
    assert memory(config, [config.model])["teachers"] < memory(config, [LARGE_SHAPE])["teachers"]
    many = []
    for teacher in ("--data_dir data", "--teacher first"):
        asked = f"plan {small_flags('tokenizer', 'dtype')} {teacher} --accelerator h100 --nproc 2"
        code, out, err = losscurve(f"{asked} --scale --json")
        assert code == 0, err
        many.append(json.loads(out))
    alone, taught = many
    assert taught["memory"]["fsdp"].keys() - alone["memory"]["fsdp"].keys() == {"teachers"}
    assert taught["seconds"].keys() - alone["seconds"].keys() == {"teachers"}
    code, out, err = losscurve("plan --teacher first --time 6s --out timed.toml")
    assert code == 0, err
    assert "no prediction: of its text only the tokens are known" in out
    settings = read_toml("timed.toml")
    assert (settings["teacher"], settings["block_size"], settings["data_dir"]) == (("first",), 16, str(here / "data"))
    rehearsing = Rehearsal(config_for(here, data_dir=None, teacher="first"), 2, 2, False, here / "rehearsed")
    assert (rehearsing.small.teacher, rehearsing.config.data_dir) == ((), str(here / "data"))
    rehearsing.folder.mkdir()
    assert rehearsing.text()[0]


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("bytes", "has a vocabulary of 257, and the weights of first one of 12"),
        ("nowhere", "nowhere: no such file"),
        ("shorter", "block_size = 16: the teacher shorter sees 8 tokens"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "plan --accelerator h100", "plan --time 6s", "rehearse --nproc 2"])
def test_a_teacher_beside_other_weights_is_checked_against_them(several_runs, losscurve, command, teacher, message):
    """The block size that is not given is that of the weights, 16, and not the 64 of the chapter."""
    code, _, err = losscurve(f"{command} --data_dir data --init_from first --teacher {teacher} --out_dir second")
    assert (code, message in err) == (2, True), err


def test_a_step_with_a_teacher_is_measured_with_what_it_predicts(here, monkeypatch):
    taught = []
    forward = loss_module._TaughtCrossEntropy.forward
    monkeypatch.setattr(loss_module._TaughtCrossEntropy, "forward", lambda *given: taught.append(1) or forward(*given))
    config = config_for(here, vocab_size=30)
    for teacher, is_taught in (((), False), ("not yet", True)):
        timing.probe(from_settings({"teacher": teacher}, config), seconds=0.1)
        assert bool(taught) == is_taught


def test_its_losses_compare_with_those_of_a_run_without(here):
    """The first loss is that of the same batch and weights without a teacher."""
    trained(config_for(here, out_dir="first", **OTHER_SHAPE))
    rows = []
    for name, more in {"alone": {}, "taught": {"teacher": "first"}}.items():
        trained(config_for(here, out_dir=name, max_steps=4, **more))
        rows.append(read_record(Path(name)))
    assert rows[0][0]["loss"] == rows[1][0]["loss"]
    with pytest.raises(UserError, match="teacher_share"):
        from_settings({"teacher_share": 0.7})


# ---- train --time, with a teacher first


@pytest.fixture
def much_time(here, monkeypatch):
    """A few seconds are so much for the text here that a run of them gets a teacher."""
    monkeypatch.setattr(rule, "TEACHERS", ((0, 0, 0.0), (7, 1, 1 / 3)))
    monkeypatch.setattr(rule, "LEAST_TAUGHT_STEPS", 20)
    monkeypatch.setattr(rule, "LEAST_STEPS", 5)  # so few seconds are enough on a busy machine, too
    monkeypatch.setattr(timing, "STARTING_SECONDS", 0.2)
    return here


def test_much_time_for_a_text_is_shared_with_a_teacher(much_time, losscurve, monkeypatch):
    monkeypatch.setattr("llm.commands.train.train_all", lambda words, *more: train_all(words, *more[:2], note))
    commands, kept = [], []

    def note(words, kept_bytes):
        commands.append(words)
        kept.append(kept_bytes)
        return 0

    code, out, err = losscurve("train --text text.txt --time 12s --block_size 64 --out_dir run --seed 5")
    assert (code, err.count("error")) == (0, 0)
    assert "first 4 s for a teacher in run-teacher, then a run that learns from what it predicts, too" in out
    assert "machine" not in out  # the five lines are those of each run, and none is of the run without a teacher
    rest = ["--seed=5", "--block_size=64", "--text=text.txt"]
    assert commands[0] == ["--time=4", "--out_dir=run-teacher", *rest]
    assert kept[1] == kept[0] + MEASURED_SHAPE_BYTES
    left = int(commands[1][0].removeprefix("--time="))
    assert (0 < left < 12, commands[1][1:]) == (True, ["--out_dir=run", *rest[:2], "--teacher=run-teacher", rest[2]])


def test_a_plan_for_much_time_has_the_teachers_too(much_time, losscurve, monkeypatch):
    monkeypatch.setattr(proposal, "short_probe", machine(1e10))
    asked = "plan --text text.txt --time 24s --batch_size 12 --out_dir runs/mine"
    code, out, err = losscurve(f"{asked} --out mine.toml")
    assert code == 0, err
    names = ["mine-teacher-teacher.toml", "mine-teacher.toml", "mine.toml"]
    first, second, third = (read_toml(name) for name in names)
    assert [run["out_dir"] for run in (first, second, third)] == [
        "runs/mine-teacher-teacher",
        "runs/mine-teacher",
        "runs/mine",
    ]
    assert [run.get("teacher") for run in (first, second, third)] == [None, (first["out_dir"],), (second["out_dir"],)]
    assert first["max_time"] == pytest.approx(24 / 9)
    for run, rest in ((second, 16 / 3), (third, 16)):  # without the seconds of its first choice
        assert rest - 2 < run["max_time"] < rest
    assert {run["block_size"] for run in (first, second, third)} == {third["block_size"]}
    assert re.findall(r"\n\nrun (\d of 3), in (\S+):\ntext  ", out) == [
        ("1 of 3", first["out_dir"]),
        ("2 of 3", second["out_dir"]),
        ("3 of 3", third["out_dir"]),
    ]
    assert [line.partition(":")[2].split(",")[0] for line in out.splitlines()[:2]] == [
        " first 8 s for a teacher in runs/mine-teacher",
        " first 2.67 s for a teacher in runs/mine-teacher-teacher",
    ]
    commands = [f"losscurve train --preset {name}" for name in names]
    assert out.splitlines()[-1] == f"wrote {', '.join(names)}; train them with: {' && '.join(commands)}"
    for command in commands:
        code, _, err = losscurve(f"{command.removeprefix('losscurve ')} --max_steps 2 --sample_tokens 2")
        assert code == 0, err
    written = {name: Path(name).read_bytes() for name in names}
    Path("mine.toml").unlink()
    shutil.rmtree("runs")  # else the teachers' folders have other names, and the files too
    code, out, err = losscurve(f"{asked} --out mine.toml")
    assert (code, out, "mine-teacher-teacher.toml: already exists" in err) == (2, "", True), err
    assert {name: Path(name).read_bytes() for name in names[:2]} == {name: written[name] for name in names[:2]}
    assert not Path("mine.toml").exists()
    facts = json.loads(losscurve(f"{asked} --json")[1])
    assert [list(plan) for plan in facts["teachers"]] == 2 * [list(facts)[:-1]]
    assert ["teachers" in plan["memory"] for plan in (*facts["teachers"], facts)] == [False, True, True]


@pytest.fixture
def few_steps(monkeypatch):
    """A run of any time is done after a few steps, and calls for a teacher all the same."""
    monkeypatch.setattr(rule, "ENOUGH_STEPS", 20)
    monkeypatch.setattr(rule, "MOST_REPETITION", 0)
    monkeypatch.setattr(rule, "LEAST_TAUGHT_PASSES", 0)
    monkeypatch.setattr(rule, "DROPOUTS", ((0, 0, 0.1), (16, 60, 0.1)))  # so that several teachers are possible


@pytest.fixture
def two_teachers(much_time, monkeypatch):
    """A run of 10 seconds or more gets two."""
    monkeypatch.setattr(rule, "TEACHERS", ((0, 0, 0.0), (7, 1, 1 / 3), (10, 2, 1 / 3)))
    return much_time


TWO = ["run-teacher-a", "run-teacher-b"]


def test_more_time_is_shared_with_several_teachers(two_teachers, losscurve, monkeypatch):
    monkeypatch.setattr("llm.commands.train.train_all", lambda words, *more: train_all(words, *more[:2], note))
    commands, codes = [], iter([0, 143, 0, 0, 0])

    def note(words, kept_bytes):
        commands.append(words)
        return next(codes)

    asked = "train --text text.txt --time 18s --block_size 64 --out_dir run --seed 5"
    code, out, _ = losscurve(asked)
    assert code == 143
    assert "first 3 s for each teacher in run-teacher-a and run-teacher-b, then a run that learns from what they" in out
    rest = ["--block_size=64", "--text=text.txt"]
    expected = [["--time=3", f"--out_dir={TWO[0]}", "--seed=5", *rest]]
    expected += [["--time=3", f"--out_dir={TWO[1]}", "--seed=1005", *rest]]
    assert commands == expected
    last = ["--out_dir=run", "--seed=5", rest[0], *(f"--teacher={name}" for name in TWO), rest[1]]
    told = shlex.join(["losscurve", "train", "--time=12", *last])
    assert out.splitlines()[-1] == f"after that, train the run with: {told}"
    commands.clear()
    assert losscurve(asked)[0] == 0
    left = int(commands[2][0].removeprefix("--time="))
    assert (commands[:2], 12 < left < 18, commands[2][1:]) == (expected, True, last)


def test_a_plan_for_more_time_has_several_teachers(two_teachers, losscurve, monkeypatch):
    monkeypatch.setattr(proposal, "short_probe", machine(1e10))
    code, _, err = losscurve("plan --text text.txt --time 18s --out_dir run/ --out mine.toml --seed 2")
    assert code == 0, err
    names = ["mine-teacher-a.toml", "mine-teacher-b.toml", "mine.toml"]
    runs = [read_toml(name) for name in names]
    assert [run["out_dir"] for run in runs] == [*TWO, "run/"]
    assert [run["seed"] for run in runs] == [2, 1002, 2]
    assert [run.get("teacher") for run in runs] == [None, None, tuple(TWO)]
    assert [run["max_time"] for run in runs[:2]] == [3, 3]
    assert 10 < runs[2]["max_time"] < 12
    for name in names:
        code, _, err = losscurve(f"train --preset {name} --max_steps 2 --sample_tokens 2")
        assert code == 0, err


def test_fit_has_several_teachers_too_and_tells_the_rest(two_teachers, few_steps, monkeypatch):
    said = []
    run = fit("text.txt", time="12s", out_dir="run", sample_tokens=0, say=said.append)
    assert (run.path, run.config.teacher) == (Path("run"), tuple(TWO))
    assert [run_config(Path(name)).seed for name in (*TWO, "run")] == [1337, 2337, 1337]
    monkeypatch.setattr("llm.training.live.LiveRun.stop_requested", lambda run: "interrupted")
    monkeypatch.setattr("llm.run.interrupts", lambda: contextlib.nullcontext([2]))
    first = fit("text.txt", time="12s", out_dir="again", sample_tokens=0, say=said.append)
    assert first.path == Path("again-teacher-a")
    told = [line for line in said if line.startswith("after that")]
    assert re.findall(r"out_dir='([\w-]*)'", "".join(told)) == ["again-teacher-b", "again"]
    assert "teacher=['again-teacher-a', 'again-teacher-b'], time='8'" in told[-1]


def test_one_teacher_may_be_given_by_its_name_alone(here):
    """As settings were written when a run had one teacher at most."""
    Path("one.toml").write_text('teacher = "runs/first"\n', encoding="utf-8")
    assert from_settings(read_toml("one.toml")).teacher == ("runs/first",)


def test_what_is_planned_is_what_is_trained(much_time, losscurve, monkeypatch):
    """Token files that are there keep their tokens, in the taught run, too."""
    monkeypatch.setattr(proposal, "short_probe", machine(1e10))
    monkeypatch.setattr("llm.train.keep_time", lambda *_: iter(()))
    assert losscurve("prepare text.txt --tokenizer char --data_dir tokens")[0] == 0
    asked = "--text text.txt --data_dir tokens --time 8s --out_dir run --sample_tokens 2 --n_embd 16 --n_layer 1"
    code, _, err = losscurve(f"plan {asked} --out run.toml")
    assert code == 0, err
    code, _, err = losscurve(f"train {asked}")
    assert code == 0, err
    for name in ("run-teacher", "run"):
        planned, trained_one = from_settings(read_toml(f"{name}.toml")), run_config(Path(name))
        assert (trained_one.tokenizer, trained_one.teacher) == (planned.tokenizer, planned.teacher)
        assert planned.tokenizer == "char"
        assert planned.model.block_size == trained_one.model.block_size
        assert planned.max_time == pytest.approx(trained_one.max_time, abs=3)


def test_a_taught_run_is_predicted_unless_its_teacher_is_larger(much_time, losscurve, monkeypatch):
    monkeypatch.setattr(proposal, "short_probe", machine(1e10))
    monkeypatch.setattr(loss, "predict", lambda properties: loss.Prediction(1.5, 2.5))
    monkeypatch.setattr(text_facts, "LEAST_VALIDATED", 10)
    trained(config_for(much_time, out_dir="first", data_dir="tokens", tokenizer="byte", text="text.txt"))
    for width, line in ((32, "1.50 to 2.50 bits"), (8, "no prediction: no runs with a teacher larger than the model")):
        code, out, err = losscurve(f"plan --text text.txt --teacher first --time 6s --n_embd {width}")
        assert code == 0, err
        assert f"loss       {line}" in out


def test_a_teacher_that_is_interrupted_tells_the_rest(much_time, losscurve, monkeypatch):
    monkeypatch.setattr(rule, "TEACHERS", ((0, 0, 0.0), (60, 1, 1 / 3)))
    monkeypatch.setattr("llm.training.live.LiveRun.stop_requested", lambda run: "interrupted")
    code, out, _ = losscurve("train --text text.txt --time 60s --out_dir run --sample_tokens 2")
    assert (code, Path("run").exists()) == (143, False)
    monkeypatch.undo()
    commands = re.findall(r": (losscurve train .*)", out)
    assert [shlex.split(command)[2:4] for command in commands] == [
        ["--out_dir", "run-teacher"],
        ["--time=40", "--out_dir=run"],
    ]


def test_an_interrupt_while_a_teacher_is_chosen_tells_the_rest(two_teachers, few_steps, losscurve, monkeypatch):
    trained_ones = []

    def interrupt_the_second(words, kept_bytes):
        if trained_ones:
            raise KeyboardInterrupt
        trained_ones.append(words)
        return 0

    monkeypatch.setattr(
        "llm.commands.train.train_all", lambda words, *more: train_all(words, *more[:2], interrupt_the_second)
    )
    code, out, _ = losscurve("train --text text.txt --time 12s --out_dir run")
    assert code == 130
    commands = re.search(r"train it and the run with: (.*)", out)[1].split(" && ")
    assert [f"--out_dir={TWO[1]}" in command for command in commands] == [True, False]
    assert "--out_dir=run " in commands[1]


def test_fit_shares_its_time_too(much_time, few_steps):
    Path("text.txt").write_text(words(300), encoding="utf-8")  # 40 passes over it are soon done
    said = []
    run = fit("text.txt", time="9s", out_dir="run", sample_tokens=0, say=said.append)
    teacher = run_config(Path("run-teacher"))
    assert (run.path, run.config.teacher, run.config.model.dropout) == (Path("run"), ("run-teacher",), 0.0)
    assert (run.config.data_dir, run.config.vocab_size) == (teacher.data_dir, teacher.vocab_size)
    assert (teacher.teacher, teacher.model.block_size) == ((), run.config.model.block_size)
    assert sum("for a teacher in run-teacher" in line for line in said) == 1
    assert sum(read_record(Path(name))[-1]["seconds"] for name in ("run-teacher", "run")) < 9
