"""Standard input, output and error as a terminal, a service or a full disk leave them to a command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment, flags

from llm.commands import bars
from llm.commands.main import main

UNWRITABLE = "error: standard output cannot be written ({}); send it to a file or a pipe that takes it\n"
SETTLED = "import os, sys; from llm.commands import bars, streams; streams.settle(); "


def shell(line: str, *arguments: object, **env: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a line of the shell, in which "$@" is a Python with these arguments."""
    command = ["sh", "-c", line, "sh", sys.executable, *map(str, arguments)]
    ended = subprocess.run(command, env=environment() | env, capture_output=True, encoding="utf-8", check=False)
    return ended.returncode, ended.stdout, ended.stderr


@pytest.mark.parametrize(
    ("line", "command", "expected"),
    [
        ('"$@" >&-', "runs", (1, "", UNWRITABLE.format("it is closed"))),
        ('"$@" >&-', "--help", (1, "", UNWRITABLE.format("it is closed"))),
        ('"$@" >&-', "train --help", (1, "", UNWRITABLE.format("it is closed"))),
        ('"$@" <&- >&-', "runs", (1, "", UNWRITABLE.format("it is closed"))),
        ('"$@" <&- >&- 2>&-', "runs", (1, "", "")),
        ('"$@" 2>&-', "runs", (0, "no run in or below .; losscurve train makes one\n", "")),
        ('"$@" 2>&-', "runs --sort nothing", (2, "", "")),  # and not on stdout
        ('"$@" <&-', "sample --prompt_file -", (2, "", "error: standard input is closed; give a file instead of -\n")),
        # a disk that is full, by a limit of 0 bytes to a file
        ('ulimit -f 0; "$@" > full', "runs", (1, "", UNWRITABLE.format("File too large"))),
        ('ulimit -f 0; "$@" > full', "--help", (1, "", UNWRITABLE.format("File too large"))),
        ('ulimit -f 0; "$@" > full', "train --help", (1, "", UNWRITABLE.format("File too large"))),
        ('ulimit -f 0; "$@" 2> full', "runs --sort nothing", (2, "", "")),
        ('ulimit -f 0; PYTHONUNBUFFERED=1 "$@" > full', "runs", (1, "", UNWRITABLE.format("File too large"))),
    ],
)
def test_output_that_could_not_be_written_is_noticed(here, line, command, expected):
    assert shell(line, "-m", "llm", *command.split()) == expected


def test_a_reader_that_went_away_is_no_news(here):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "llm", "runs"]
    ended = subprocess.run(command, env=environment(), stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (1, b"")


def test_no_file_takes_the_number_of_a_closed_stream(here):
    ours = SETTLED + "print(open('text.txt').fileno(), file=open('number', 'w'))"
    assert shell('"$@" <&- >&- 2>&-', "-c", ours)[0] == 0
    assert int(Path("number").read_text()) > 2
    # nor in a process that we start
    child = "import subprocess; subprocess.run([sys.executable, '-c', 'open(\"child\", \"w\").write(str(os.dup(0)))'])"
    child = child.replace("'open", "'import os; open")
    assert shell('"$@" <&- >&- 2>&-', "-c", SETTLED + child)[0] == 0
    assert int(Path("child").read_text()) > 2


@pytest.mark.parametrize("stream", [">&-", "> full"])
def test_a_run_goes_on_where_its_lines_cannot_be_written(here, stream):
    code, _, err = shell(f'ulimit -f 0; "$@" {stream}', "-c", SETTLED + "bars.log('one'); bars.log('two')")
    why = "it is closed" if stream == ">&-" else "File too large"
    assert (code, err) == (
        0,
        f"warning: standard output cannot be written ({why}); the run goes on and saves its files\n",
    )


def test_a_training_whose_lines_are_lost_ends_well(here, losscurve, monkeypatch):
    def full(line: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bars, "tell", full)
    code, out, err = losscurve(f"train --text text.txt {flags(max_steps=2, warmup_steps=0)}")
    assert (code, out) == (0, "")
    assert "warning: standard output cannot be written (No space left on device); the run goes on" in err
    assert Path("checkpoints/model.pt").exists()


def test_an_argument_in_utf8_is_read_where_the_locale_is_ascii(here):
    """Also as the name of a file, and its words are printed as they are."""
    Path("é").mkdir()
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert shell('"$@"', "-m", "llm", "runs", "é", **ascii_only) == (
        0,
        "no run in or below é; losscurve train makes one\n",
        "",
    )


def test_an_argument_that_is_not_utf8_is_named(here, capsys):
    assert main(["sample", "--prompt", "caf\udce9"]) == 2
    assert capsys.readouterr().err.startswith("error: the argument --prompt is not valid UTF-8 (caf\\xe9); type it in")
    assert main(["train", "--text", "text.txt", "--sample_prompt", "caf\udce9"]) == 2
    assert "sample_prompt = 'caf\\udce9': not valid UTF-8; type it in" in capsys.readouterr().err
    assert main(["verify", "caf\udce9"]) == 2
    assert capsys.readouterr().err.startswith("error: caf\\xe9: neither a run")
