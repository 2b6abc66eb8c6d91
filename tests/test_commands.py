"""The commands as typed: what they print, what they write, and one clear line for every mistake."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import environment, flags, needs_gpt2, with_small

from llm import GPT, GPTConfig, storage
from llm.commands.train import exit_code
from llm.record.metrics import read_record


def untouched(folder: Path) -> list[str]:
    """Return the files in a folder, without locks."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.name != ".lock" and p.is_file())


@pytest.fixture
def run(here, losscurve):
    """A small trained run in checkpoints/, with its data in data/."""
    code, out, err = losscurve(f"train --text text.txt --data_dir data {flags()}")
    assert code == 0, err
    return out


def test_train_prints_the_chapters_lines_and_what_to_do_next(run):
    lines = run.splitlines()
    assert lines[0].startswith("training on cpu (1 thread), ")
    steps = [
        line for line in lines if re.fullmatch(r"step +\d+ \| lr 0\.\d{5} \| train \d+\.\d{4} \| val .* \| t .*s", line)
    ]
    assert [int(line[5:11]) for line in steps] == [0, 4, 8, 12]
    assert "best val" in run
    assert "landmarks: ln V =" in run
    assert "next: losscurve sample --out_dir checkpoints" in run
    assert lines[-1] == "saved checkpoints/model.pt"
    samples = Path("checkpoints/samples.txt").read_text(encoding="utf-8")
    assert re.findall(r"--- step (\d+) \|", samples) == ["0", "4", "8", "12"]


def test_a_vocabulary_of_one_character_has_nothing_to_guess(here, losscurve):
    Path("a.txt").write_text("a" * 900, encoding="utf-8")
    code, out, err = losscurve(f"train --text a.txt --explain {flags()}")
    assert code == 0
    assert "train 0.0000 | val 0.0000" in out
    assert "best val 0.0000 (0.000 bits per byte)" in out
    assert "landmark" not in out
    assert "ln V" not in err
    assert "-0.0" not in out + Path("checkpoints/samples.txt").read_text(encoding="utf-8")
    assert all(row["loss"] >= 0 for row in read_record(Path("checkpoints")))
    assert losscurve("explain checkpoints")[1].startswith("nothing to report")
    assert losscurve("report checkpoints")[0] == 0
    assert "ln V" not in Path("checkpoints/report.html").read_text(encoding="utf-8")


def test_files_that_are_no_runs_are_left_alone(here, losscurve):
    """Also with --overwrite, which replaces runs only."""
    for name in ("samples.txt", "best", "notes.md"):
        Path("own").mkdir(exist_ok=True)
        Path("own", name).write_text("mine", encoding="utf-8")
    for more in ("", "--overwrite"):
        code, _, err = losscurve(f"train --text text.txt --out_dir own {flags()} {more}")
        told = "own: holds samples.txt, which is of no run and would be replaced; choose another --out_dir"
        assert (code, err) == (2, f"error: {told}\n")
    Path("own/samples.txt").unlink()
    for more in ("", "--overwrite"):
        assert losscurve(f"train --text text.txt --out_dir own {flags(max_steps=3)} {more}")[0] == 0
        assert Path("own/notes.md").read_text(encoding="utf-8") == "mine"


def test_a_run_in_place_of_a_text_gets_the_flag_that_is_meant(run, losscurve):
    for command, told in (
        ("train --resume checkpoints", "checkpoints: is a run; to continue it: --resume --out_dir checkpoints"),
        ("schedule checkpoints", "for its schedule: losscurve schedule --preset checkpoints/config.toml"),
        ("try --vary n_layer=1,2 n_head=1,2", "n_head=1,2: has no flag; write --vary n_head=1,2"),
    ):
        code, _, err = losscurve(command)
        assert (code, told in err) == (2, True), err


def test_a_run_is_never_overwritten_in_silence(run, losscurve):
    before = Path("checkpoints/model.pt").read_bytes()
    code, out, err = losscurve(f"train --text text.txt --data_dir data {flags()}")
    assert (code, out) == (2, "")
    assert "holds a run saved at step 12" in err
    assert all(word in err for word in ("--resume", "--overwrite", "--out_dir"))
    assert Path("checkpoints/model.pt").read_bytes() == before
    code, _, _ = losscurve(f"train --text text.txt --data_dir data {flags(seed=2)} --overwrite")
    assert code == 0
    assert Path("checkpoints/model.pt").read_bytes() != before


def test_resume_continues_and_refuses_what_would_be_another_run(run, losscurve):
    code, _, err = losscurve("train --resume")
    assert code == 2
    assert "complete at step 12; give a larger --max_steps" in err
    code, _, err = losscurve("train --resume --n_layer 3")
    assert code == 2
    assert "n_layer was 2 in this run and cannot become 3" in err
    code, out, err = losscurve("train --resume --max_steps 16")
    assert code == 0
    assert "the schedule changes" in err
    assert "resuming from step 12" in out
    assert [r["step"] for r in read_record(Path("checkpoints")) if r["split"] == "val"] == [0, 4, 8, 12, 16]
    code, _, err = losscurve("train --resume --out_dir nowhere")
    assert code == 2
    assert "nowhere: no run here" in err


@pytest.mark.pictures
@pytest.mark.parametrize(
    "command",
    ["report {}", "export {} --to hf --out o", "plot {}", "compare {} {}", "fork {} --at 4", "sample --out_dir {}"],
)
def test_a_file_in_place_of_a_run_folder_is_told(run, losscurve, command):
    code, _, err = losscurve(command.replace("{}", "checkpoints/model.pt"))
    assert code == 2
    assert err == "error: checkpoints/model.pt: is a file; give the folder of a training run, such as checkpoints\n"
    code, _, err = losscurve(command.replace("{}", "text.txt"))
    assert code == 2
    assert err == "error: text.txt: is a file; give the folder of a training run\n"


def check_interrupted(run_dir, out):
    """Check that a run that was interrupted has saved its state, and says how it goes on."""
    step = int(re.search(rf"saved step (\d+) in {run_dir}", out)[1])
    assert f"continue with: losscurve train --out_dir {run_dir} --resume" in out
    assert (run_dir / f"step-{step:06d}" / "manifest.json").exists()


def wait_for_rows(run_dir, count):
    """Wait until a run has recorded so many rows."""
    record, deadline = run_dir / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not (record.exists() and record.read_text().count("\n") >= count):
        time.sleep(0.05)


def test_a_signal_after_the_last_step_ends_what_would_follow_too():
    ends = [("done", []), ("done", [signal.SIGINT]), ("interrupted", [signal.SIGHUP]), ("interrupted", [])]
    codes = [exit_code(SimpleNamespace(reason=reason), caught) for reason, caught in ends]
    assert codes == [0, 130, 129, 143]


def test_an_interrupt_saves_and_prints_how_to_resume(here, start):
    process = start(f"train --text text.txt --data_dir data {flags(max_steps=10**6)}")
    wait_for_rows(Path("checkpoints"), 6)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    check_interrupted(Path("checkpoints"), out)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_so_do_other_signals(here, losscurve, number, code):
    def interrupt():
        wait_for_rows(Path("checkpoints"), 6)
        os.kill(os.getpid(), number)

    with ThreadPoolExecutor() as threads:
        done = threads.submit(interrupt)
        found, out, err = losscurve(f"train --text text.txt --data_dir data {flags(max_steps=10**6)}")
        done.result()
    assert found == code, err
    check_interrupted(Path("checkpoints"), out)


def test_a_shape_that_no_machine_holds_is_one_clear_line(here, losscurve):
    code, _, err = losscurve(f"train --text text.txt {flags(n_embd=131072, n_layer=1000, ffn_mult=64)}")
    assert code == 1
    assert err.splitlines()[-1].startswith("error: not enough memory; lower")
    assert not Path("checkpoints").exists()


def test_a_closed_pipe_does_not_end_a_run(here):
    command = f"{sys.executable} -m llm train --text text.txt {flags()} | head -c 1"
    subprocess.run(command, shell=True, env=environment(), check=False, stdout=subprocess.DEVNULL)
    assert Path("checkpoints/step-000012/manifest.json").exists()


MISTAKES = {
    "--n_layers 3": "unknown argument --n_layers; did you mean --n_layer?",
    "--n_layer 0": "n_layer = 0: expected a whole number at least 1",
    "--n_layer 1.5": "n_layer = '1.5': expected a whole number",
    "--n_head 5": "n_embd = 16 is not divisible by n_head = 5; try --n_embd 20",
    "--batch_size -3": "batch_size = -3: expected",
    "--max_lr nan": "max_lr = nan: expected",
    "--max_lr inf": "max_lr = inf: expected",
    "--max_lr 0": "max_lr = 0.0: expected a number above 0",
    "--dropout 1": "dropout = 1.0: expected",
    "--max_lr 1e-300": "max_lr = 1e-300: below 1.2e-38, the smallest normal float32 number, "
    "and training uses float32; give",
    "--min_lr 1e-40": "min_lr = 1e-40: below 1.2e-38",
    "--weight_decay 1e-300": "weight_decay = 1e-300: below",
    "--beta1 1e-300": "beta1 = 1e-300: below",
    "--dropout 1e-300": "dropout = 1e-300: below",
    "--grad_clip 1e-300": "grad_clip = 1e-300: below",
    "--grad_clip 1e300": "grad_clip = 1e+300: above 3.4e+38, the largest float32 number, and training uses float32; "
    "give a smaller",
    "--warmup_steps 12": "warmup_steps = 12 is not below max_steps = 12",
    "--min_lr 1": "min_lr = 1.0 is above max_lr = 0.01",
    "--max_time soon": "max_time = 'soon': expected a duration such as 90, 10m or 2h",
    "--schedule cosin": "schedule = 'cosin': expected one of cosine, linear, constant",
    "--preset chapte": "unknown preset 'chapte'; did you mean 'chapter'?",
    "--preset my.toml": "my.toml: cannot be read",
    "--device gpu": "device = 'gpu': expected auto, cpu, mps, cuda or cuda:N",
    "--device cuda:9": "PyTorch sees",
    "--data_dir nowhere": "data_dir = nowhere: no train.bin there",
    "--text missing.txt": "missing.txt",
    "--text empty.txt": "empty.txt: the text is empty",
    "--text short.txt": "a window needs 17",
    "--text latin.txt": "latin.txt: not UTF-8 at byte 3",
    "--text nothing": "nothing",
    "--text text.txt --out_dir text.txt/run": "text.txt/run: cannot write there",
    "--text text.txt --init_from nowhere": "nowhere: no such file or folder",
    "--text text.txt --init_from text.txt": "text.txt: is a text, not weights",
    "--text text.txt --sample_prompt !": "'!'",
    "--out_dir=": "out_dir = '': expected a non-empty string",
    "--text text.txt --data_dir d --out_dir d": "out_dir = d: is the folder of the token files",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_train_is_one_clear_line(here, losscurve, mistake):
    Path("empty.txt").touch()
    Path("short.txt").write_text("abcdefgh", encoding="utf-8")
    Path("latin.txt").write_bytes(b"abc\xe9 " * 100)
    Path("nothing").mkdir()
    before = untouched(here)
    code, out, err = losscurve(f"train {with_small(mistake)}")
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if not line.startswith("warning")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert MISTAKES[mistake] in lines[0]
    made = set(untouched(here)) - set(before)
    assert all(path.startswith("data/") for path in made), made  # at most the token files of a valid text


def test_a_full_disk_is_one_clear_line(here, losscurve, monkeypatch):
    losscurve("prepare text.txt --tokenizer char")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    code, out, err = losscurve(f"train --data_dir data {flags()}")
    assert (code, out) == (2, "")
    assert "checkpoints: 0 MiB free" in err
    assert not Path("checkpoints").exists()


BROKEN = {
    "odd": (b"\1\0" * 200 + b"\1", "401 bytes is not a whole number of uint16 ids"),
    "empty": (b"", "train.bin: 0 tokens"),
    "short": (b"\1\0" * 9, "train.bin: 9 tokens, and a window needs 17"),
    "id": (b"\1\0" * 30 + b"\xff\xff" + b"\1\0" * 30, "token 30 has id 65535, and the vocabulary has 50257"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_token_file_is_one_clear_line(here, losscurve, what):
    Path("data").mkdir()
    Path("data/train.bin").write_bytes(BROKEN[what][0])
    Path("data/val.bin").write_bytes(b"\1\0" * 50)
    code, out, err = losscurve("train --block_size 16 --data_dir data")
    assert (code, out) == (2, "")
    assert BROKEN[what][1] in err
    assert len(err.splitlines()) == 1
    assert not Path("checkpoints").exists()


def test_a_meta_that_does_not_fit_its_files_is_one_clear_line(run, losscurve):
    with open("data/val.bin", "ab") as file:
        file.write(b"\1\0")
    code, out, err = losscurve(f"train --data_dir data --out_dir other {flags()}")
    assert (code, out) == (2, "")
    assert "meta.json: describes a val.bin of" in err


def test_a_run_folder_in_use_is_refused(here, losscurve):
    code = """
import pathlib, time, llm.storage
with llm.storage.locked(pathlib.Path("run"), "this run folder"):
    print(1, flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"1\n"
        code, _, err = losscurve(f"train --text text.txt --out_dir run {flags()}")
    finally:
        holder.kill()
        holder.communicate()
    assert code == 2
    assert "run: this run folder is in use by another process" in err


def test_token_files_of_another_program_train_as_they_are(here, losscurve):
    Path("data").mkdir()
    ids = np.random.default_rng(0).integers(0, 300, 400).astype("<u2")
    for split in ("train", "val"):
        ids.tofile(f"data/{split}.bin")
    small = flags(max_steps=2, vocab_size=300, warmup_steps=0).replace("--tokenizer char", "")
    code, _, err = losscurve(f"train --data_dir data {small}")
    assert code == 0
    assert "no meta.json, so its ids are taken for GPT-2's" in err


def test_sample_is_the_runs_own(run, losscurve):
    code, out, _ = losscurve("sample --prompt abc --max_new_tokens 20 --seed 3")
    assert code == 0
    assert out.startswith("abc")
    assert len(out) == 24
    assert losscurve("sample --prompt abc --max_new_tokens 20 --seed 3")[1] == out
    assert losscurve("sample --prompt abc --max_new_tokens 20 --seed 4")[1] != out
    greedy = losscurve("sample --prompt abc --max_new_tokens 9 --temperature 0 --weights best")[1]
    assert losscurve("sample --prompt abc --max_new_tokens 9 --top_k 1 --weights best")[1] == greedy
    assert losscurve("sample --prompt abc --max_new_tokens 9 --top_p 1e-9 --weights best")[1] == greedy
    Path("prompt.txt").write_text("abc", encoding="utf-8")
    assert losscurve("sample --prompt_file prompt.txt --max_new_tokens 20 --seed 3")[1] == out
    _, several, _ = losscurve("sample --prompt ab --max_new_tokens 5 --num_samples 3 --seed 1")
    assert [len(part.strip("\n")) >= 2 for part in several.split("---------------")] == [True] * 3
    assert losscurve("sample --prompt abc --max_new_tokens 0 --num_samples 2")[1] == "abc\n---------------\nabc\n"


def test_the_first_of_several_samples_equals_one_drawn_alone(run, losscurve):
    line = "sample --prompt ab --max_new_tokens 9 --seed 1 --num_samples"
    alone, two, three = (losscurve(f"{line} {count}")[1].split("---------------\n") for count in (1, 2, 3))
    assert alone == two[:1]
    assert two == three[:2]
    assert three[2] not in two


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("--prompt_file empty.txt", "prompt = '': expected at least one character"),
        ("--prompt Ω", "'Ω'"),
        ("--temperature -1", "temperature = -1.0: expected 0 or more"),
        ("--temperature nan", "temperature = nan: expected 0 or more"),
        ("--top_k 0", "top_k = 0: expected 1 or more"),
        ("--top_p 0", "top_p = 0.0: expected above 0"),
        ("--num_samples 0", "num_samples = 0"),
        ("--num_samples 1000000000000000000000000", "num_samples = 1000000000000000000000000: expected 1 to 65,536"),
        ("--max_new_tokens -1", "max_new_tokens = -1"),
        ("--out_dir nowhere", "nowhere: no run here"),
        ("--checkpoint missing.pt", "missing.pt: no such file"),
        ("--checkpoint text.txt", "text.txt: is a text"),
        ("--promt x", "did you mean --prompt?"),
        ("--prompt_file missing", "prompt_file missing: cannot be read"),
    ],
)
def test_a_mistake_in_sample_is_one_clear_line(here, losscurve, request, mistake, words):
    if "Ω" in mistake or "num_samples 1" in mistake:
        request.getfixturevalue("run")
    Path("empty.txt").touch()
    code, out, err = losscurve(f"sample {mistake}")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert words in err


@needs_gpt2
def test_a_bare_state_dict_is_sampled_with_gpt2s_tokens(here, losscurve):
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_embd=32, block_size=8))
    torch.save(model.state_dict(), "bare.pt")
    code, out, err = losscurve("sample --checkpoint bare.pt --max_new_tokens 12 --seed 1")
    assert code == 0
    assert out.startswith("ROMEO:")
    assert "has no tokenizer beside it, so GPT-2's tokens and 4 heads are assumed" in err


def test_a_pickle_that_runs_code_is_refused(here, losscurve):
    class Evil:
        def __reduce__(self):
            return (Path("pwned").touch, ())

    torch.save({"wte.weight": Evil()}, "evil.pt")
    code, _, err = losscurve("sample --checkpoint evil.pt")
    assert code == 2
    assert "holds Python objects" in err
    assert not Path("pwned").exists()


@pytest.mark.pictures
def test_schedule_and_plot_write_their_pictures(run, losscurve):
    code, out, _ = losscurve("schedule --max_steps 200 --out s.png")
    assert code == 0
    assert "wrote s.png" in out
    code, _, _ = losscurve("plot checkpoints --out curve.svg")
    assert code == 0
    assert Path("curve.svg").stat().st_size > 5000


@pytest.mark.parametrize("words", ["", "--help", "trian", "train --help"])
def test_usage(words, capsys):
    command = [sys.executable, "-m", "llm", *words.split()]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == (0 if "help" in words else 2)
    assert ("did you mean 'train'?" in ended.stderr) == (words == "trian")


def test_a_dead_process_leaves_no_lock(here):
    code = "import os, llm.storage as s, pathlib\nwith s.locked(pathlib.Path('run'), 'x'):\n os._exit(9)"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=False)
    with storage.locked(Path("run"), "this run folder"):
        pass


def test_an_ascii_terminal_gets_question_marks():
    code = "from llm.commands.main import main; print(main(['--help'])); print('\\u00e9')"
    around = os.environ | {"PYTHONIOENCODING": "ascii"}
    ended = subprocess.run([sys.executable, "-c", code], env=around, capture_output=True, check=True)
    assert ended.stdout.split()[-2:] == [b"0", b"?"]
