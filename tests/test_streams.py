"""Standard input, output and error that are closed, full, or in an ASCII locale."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment, flags

from llm.commands import bars
from llm.commands.main import main

UNWRITABLE = "error: cannot write to standard output ({}); redirect it to a file or pipe that can be written\n"
WITH_USABLE_STREAMS = "import os, sys; from llm.commands import bars, streams; streams.make_usable(); "


def shell(line: str, *arguments: object, **env: str) -> tuple[int, str, str]:
    """Run a line in the shell, where "$@" is Python with these arguments; return exit code, stdout and stderr."""
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
        # a full disk, simulated by a limit of 0 bytes per file
        ('ulimit -f 0; "$@" > full', "runs", (1, "", UNWRITABLE.format("File too large"))),
        ('ulimit -f 0; "$@" > full', "--help", (1, "", UNWRITABLE.format("File too large"))),
        ('ulimit -f 0; "$@" > full', "train --help", (1, "", UNWRITABLE.format("File too large"))),
        ('ulimit -f 0; "$@" 2> full', "runs --sort nothing", (2, "", "")),
        ('ulimit -f 0; PYTHONUNBUFFERED=1 "$@" > full', "runs", (1, "", UNWRITABLE.format("File too large"))),
    ],
)
def test_a_failed_write_to_stdout_is_an_error(here, line, command, expected):
    assert shell(line, "-m", "llm", *command.split()) == expected


def test_a_closed_pipe_prints_no_error(here):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "llm", "runs"]
    ended = subprocess.run(command, env=environment(), stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (1, b"")


def test_no_file_gets_the_descriptor_of_a_closed_stream(here):
    ours = WITH_USABLE_STREAMS + "print(open('text.txt').fileno(), file=open('number', 'w'))"
    assert shell('"$@" <&- >&- 2>&-', "-c", ours)[0] == 0
    assert int(Path("number").read_text()) > 2
    # nor in a process that we start
    child = "import subprocess; subprocess.run([sys.executable, '-c', 'open(\"child\", \"w\").write(str(os.dup(0)))'])"
    child = child.replace("'open", "'import os; open")
    assert shell('"$@" <&- >&- 2>&-', "-c", WITH_USABLE_STREAMS + child)[0] == 0
    assert int(Path("child").read_text()) > 2


@pytest.mark.parametrize("stream", [">&-", "> full"])
def test_lines_of_a_run_that_cannot_be_written_are_one_warning(here, stream):
    code, _, err = shell(
        f'ulimit -f 0; "$@" {stream}',
        "-c",
        WITH_USABLE_STREAMS + "bars.print_best_effort('one'); bars.print_best_effort('two')",
    )
    why = "it is closed" if stream == ">&-" else "File too large"
    assert (code, err) == (
        0,
        f"warning: cannot write to standard output ({why}); the run continues and saves its files\n",
    )


def test_training_succeeds_though_its_lines_cannot_be_written(here, losscurve, monkeypatch):
    def full(line: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bars, "print_result", full)
    code, out, err = losscurve(f"train --text text.txt {flags(max_steps=2, warmup_steps=0)}")
    assert (code, out) == (0, "")
    assert "warning: cannot write to standard output (No space left on device); the run continues" in err
    assert Path("checkpoints/model.pt").exists()


def test_an_argument_in_utf8_works_in_an_ascii_locale(here):
    """It names a file, and is printed unchanged."""
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
