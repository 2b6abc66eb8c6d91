"""`losscurve COMMAND` and `python -m llm COMMAND`: run the command, and print an error as one line."""

import difflib
import importlib
import sys
from collections.abc import Callable

from llm import __version__
from llm.commands import streams
from llm.errors import Failure, UserError
from llm.machine.interpreter import stand_in

COMMANDS = {  # name: module in this folder, and what the command does
    "prepare": ("prepare", "turn a text into token files"),
    "plan": ("planning.plan", "predict the memory, disk and time of a run, or propose a run for a given time"),
    "train": ("train", "train a model: batch, forward, backward, step, repeat"),
    "fork": ("fork", "start a run from a checkpoint of another, with other settings from there"),
    "try": ("trials", "train several settings with several seeds, and say which is best and what is chance"),
    "sample": ("sample", "let a trained model continue a prompt"),
    "evaluate": ("evaluate", "measure how well weights of any format predict a text"),
    "export": ("export", "write a run in the format of transformers and other programs"),
    "explain": ("look.explain", "say what a run's record shows, and what to try"),
    "watch": ("look.watch", "serve a page in the browser that follows runs as they train"),
    "report": ("look.report", "write a run as one file to share: curves, samples, data, settings"),
    "plot": ("look.plot", "draw the loss curve of one or several runs"),
    "compare": ("look.compare", "compare runs: is a setting better, or is it chance?"),
    "track": ("look.track", "show a recorded run in TensorBoard or W&B"),
    "runs": ("look.runs", "list the runs below a folder, with their best losses"),
    "schedule": ("schedule", "show a learning-rate schedule before training"),
    "verify": ("check.verify", "check every file of a run or data folder"),
    "show-batch": ("look.show_batch", "print the text of any step"),
    "memorised": ("look.memorised", "measure how much of a model's output is copied from its training text"),
    "doctor": ("check.doctor", "check what works on this machine, and how to fix what does not"),
    "rehearse": ("check.rehearse", "try a run of several processes, small: kill one, resume, compare"),
    "prove-resume": ("check.prove_resume", "kill and resume runs with your settings, and compare"),
}
OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "invalid buffer size",
)  # PyTorch's words


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if not words:
        return run_guarded("losscurve", lambda: print(usage())) or 2
    if words[0] in ("-h", "--help", "help"):
        return run_guarded("losscurve", lambda: print(usage()))
    if words[0] in ("--version", "-V", "version"):
        return run_guarded("losscurve", lambda: print(f"losscurve {__version__}"))
    if words[0] not in COMMANDS:
        streams.make_usable()
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(COMMANDS)}"
        print(f"error: unknown command {words[0]!r}; {hint}", file=sys.stderr)
        return 2
    return run_command(words[0], words[1:])


def usage() -> str:
    lines = [f"  {name:<12} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: losscurve COMMAND [flags]   (losscurve COMMAND --help lists the flags)", "", *lines])


def run_command(name: str, argv: list[str]) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 wrong usage, 130/143 interrupted."""
    return run_guarded(name, lambda: importlib.import_module(f"llm.commands.{COMMANDS[name][0]}").main(argv))


def run_guarded(name: str, work: Callable[[], int | None]) -> int:
    """Run `work`, the command `name`, and return its exit code: 1 also if its output could not be written."""
    streams.make_usable()
    code = _run(name, work)
    error = streams.flush_stdout()
    if error and not isinstance(error, BrokenPipeError):  # a closed pipe means that the reader has seen enough
        cause = f"cannot write to standard output ({streams.describe(error)})"
        print(f"error: {cause}; redirect it to a file or pipe that can be written", file=sys.stderr)
    return 1 if error and code == 0 else code


def _run(name: str, work: Callable[[], int | None]) -> int:
    """Run `work` and return its exit code. Print an expected error as one line on stderr; raise any other."""
    try:
        return int(work() or 0)
    except SystemExit as end:  # raised by argparse after --help
        return int(end.code or 0)
    except (UserError, Failure) as error:
        if not getattr(error, "quiet", False):  # quiet: another process of the run prints it
            print(f"error: {streams.escape_bytes(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        print("error: not enough memory; lower --batch_size, --block_size or the model's size", file=sys.stderr)
        return 1
    except OSError as error:
        is_of_stdout = isinstance(error, BrokenPipeError) or error is streams.last_error()
        if not is_of_stdout:  # else `run_guarded` prints it
            place = streams.escape_bytes(str(error.filename or name))
            print(f"error: {place}: {error.strerror or error}; fix this and retry", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        cause = stand_in()
        if not cause:
            raise
        print(f"error: {cause} ({type(error).__name__}: {error})", file=sys.stderr)
        return 2


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)
