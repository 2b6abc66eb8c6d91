"""`losscurve COMMAND` and `python -m llm COMMAND`: finds the command's file, and turns errors into one line."""

import importlib
import sys
from collections.abc import Callable

from llm import __version__
from llm.commands import streams
from llm.errors import Failure, UserError
from llm.machine.interpreter import stand_in

COMMANDS = {  # name: module in this folder, and what the command does
    "prepare": ("prepare", "text to token files"),
    "plan": ("plan", "what a run will take here, or what to run in a given time"),
    "train": ("train", "train a model: batch, forward, backward, step, repeat"),
    "sample": ("sample", "let a trained model continue a prompt"),
    "explain": ("look.explain", "what a run's record shows, and what to try"),
    "watch": ("look.watch", "a page in the browser that follows runs as they go"),
    "report": ("look.report", "a run as one file to share: curves, samples, data, settings"),
    "plot": ("look.plot", "draw the loss curve of one or several runs"),
    "track": ("look.track", "show a recorded run in TensorBoard or W&B"),
    "runs": ("look.runs", "a table of the runs below a folder, with their best losses"),
    "schedule": ("schedule", "show a learning-rate schedule before training"),
    "verify": ("check.verify", "check every file of a run or data folder"),
    "show-batch": ("look.show_batch", "print the text of any step"),
    "memorised": ("look.memorised", "how much of what a model writes stands in its training text"),
    "doctor": ("check.doctor", "what of this machine works, and how to repair what does not"),
    "rehearse": ("check.rehearse", "the same run, small: several processes, one killed, resumed, compared"),
    "prove-resume": ("check.prove_resume", "kill and resume runs of your settings, and compare"),
}


def usage() -> str:
    lines = [f"  {name:<12} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: losscurve COMMAND [flags]   (losscurve COMMAND --help lists the flags)", "", *lines])


def run_command(name: str, argv: list[str]) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 wrong usage, 130/143 interrupted."""
    return guarded(name, lambda: importlib.import_module(f"llm.commands.{COMMANDS[name][0]}").main(argv))


def guarded(name: str, work: Callable[[], int | None]) -> int:
    """Do the `work` of the command `name` and return its exit code: 1 also where its output could not be written."""
    streams.settle()
    code = outcome(name, work)
    lost = streams.failed()
    if lost and not isinstance(lost, BrokenPipeError):  # the reader of a pipe went away: nothing more to say
        cause = f"standard output cannot be written ({streams.reason(lost)})"
        print(f"error: {cause}; send it to a file or a pipe that takes it", file=sys.stderr)
    return 1 if lost and code == 0 else code


def outcome(name: str, work: Callable[[], int | None]) -> int:
    """Do the `work` of the command `name` and return its exit code; an error is told in one line."""
    try:
        return int(work() or 0)
    except SystemExit as end:  # of argparse, after --help
        return int(end.code or 0)
    except (UserError, Failure) as error:
        if not getattr(error, "quiet", False):  # another process of the run says it
            print(f"error: {streams.readable(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except (MemoryError, RuntimeError) as error:
        short = ("can't allocate memory", "not enough memory", "out of memory", "invalid buffer size")
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in short):
            raise
        print("error: not enough memory; lower --batch_size, --block_size or the model's size", file=sys.stderr)
        return 1
    except OSError as error:
        if isinstance(error, BrokenPipeError) or error is streams.last_error():  # of stdout: `guarded` says it
            return 1
        place = streams.readable(str(error.filename or name))
        print(f"error: {place}: {error.strerror or error}; mend that and try again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not (cause := stand_in()):
            raise
        print(f"error: {cause} ({type(error).__name__}: {error})", file=sys.stderr)
        return 2


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help", "help"):
        return guarded("losscurve", lambda: print(usage())) or (0 if words else 2)
    if words[0] in ("--version", "-V", "version"):
        return guarded("losscurve", lambda: print(f"losscurve {__version__}"))
    if words[0] not in COMMANDS:
        import difflib

        streams.settle()
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(COMMANDS)}"
        print(f"error: unknown command {words[0]!r}; {hint}", file=sys.stderr)
        return 2
    return run_command(words[0], words[1:])
