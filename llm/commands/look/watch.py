"""`watch [RUN …]`: a page in the browser that follows runs while they train, with a playground for any model.

`train --watch` serves the page in a process beside the training.
"""

import argparse
import contextlib
import queue
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from llm.commands.flags import Parser, input_path, warn
from llm.errors import Failure, UserError

DESCRIPTION = "Serve a page on this machine that follows one or several runs while they train: curves, samples, the \
learning-rate slider and a playground. It only reads the run folders. It waits for a run in a folder that has none. Of \
a try, it follows all runs, those that a search adds too. Of a model that is no run, it serves the playground."

PATIENCE = 10  # seconds that a training run waits for the page's address


def main(argv: list[str]) -> int:
    args = parse(argv)

    import secrets

    from llm.commands.bars import print_result

    try:
        from llm.page.server import Server, plotly_script
    except ModuleNotFoundError as error:
        raise UserError(f'the page needs {error.name}; pip install "losscurve[dashboard]"') from None
    plotly_script()  # raises if Plotly's script is missing
    runs = [folder for folder in args.runs if not (folder / "try.json").exists()]
    check_sources(runs, wait_for_runs=not args.until_eof)
    lower_priority()
    with listen_on(args.port) as listener:
        port = listener.getsockname()[1]
        token = secrets.token_urlsafe(24)
        server = Server(args.runs, token, port)
        if args.until_eof:

            def stop() -> None:
                server.should_exit = True

            threading.Thread(target=call_at_eof, args=(stop,), daemon=True).start()
            command = f"losscurve watch {' '.join(shlex.quote(str(folder)) for folder in args.runs)}"
            end = f"it ends with the run; {command} opens it again"
        else:
            end = "Ctrl-C ends it"
        with contextlib.suppress(KeyboardInterrupt):
            names = ", ".join(in_words(folder) for folder in args.runs)
            print_result(f"watching {names} at http://127.0.0.1:{port}/{token}/ ({end})")
            server.run(sockets=[listener])
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the parsed flags. Raises UserError for a port out of range."""
    parser = Parser("losscurve watch", DESCRIPTION)
    parser.add_argument(
        "runs",
        nargs="*",
        type=input_path,
        default=[Path("checkpoints")],
        metavar="RUN",
        help="run folders (default: checkpoints), or models: FILE.gguf, FILE.pt, folders in Hugging Face's format",
    )
    parser.add_argument("--port", type=int, default=0, metavar="PORT", help="on 127.0.0.1 (default: a free one)")
    parser.add_argument("--until_eof", action="store_true", help="end when standard input ends (for other programs)")
    args = parser.read(argv)
    if not 0 <= args.port < 65536:
        raise UserError(f"port = {args.port}: expected 0 to 65535")
    return args


def in_words(folder: Path) -> str:
    """Return a folder as it is printed: of a try, with the number of its runs."""
    from llm.page.comparison import runs_of

    runs = runs_of(folder)
    return str(folder) if runs == [folder] else f"{folder} ({len(runs)} runs)"


def check_sources(sources: list[Path], wait_for_runs: bool) -> None:
    """Raise UserError for what is neither a folder nor a model that can be used, before anything is served.

    With `wait_for_runs`, warn about a folder without a run.
    """
    from llm.page.follow import is_model

    for source in sources:
        if is_model(source):
            _check_model(source)
        elif source.exists() and not source.is_dir():
            raise UserError(f"{source}: neither a folder nor a plain file; give the --out_dir of a training run")
        elif wait_for_runs and not (source / "metrics.jsonl").exists():
            below = sorted(record.parent for record in source.glob("*/metrics.jsonl"))
            if below:
                names = shlex.join(map(str, below))
                warn(f"{source}: no run there, but below it; to follow those: losscurve watch {names}")
            else:
                warn(f"{source}: no run there yet; the page waits for one")


def _check_model(source: Path) -> None:
    """Raise UserError if a model cannot be used. It is read anew when somebody uses the playground."""
    from llm.config import GPTConfig
    from llm.weights import open_weights

    if open_weights(str(source), GPTConfig()).tokenizer is None:
        warn(f"{source}: has no tokenizer beside it, so GPT-2's tokens are assumed")


def listen_on(port: int) -> socket.socket:
    """Return a socket that listens on a port of 127.0.0.1; 0: any free port. Raises Failure if it is in use."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        listener.close()
        raise Failure(f"port {port}: {error.strerror}; give another --port, or none") from None
    listener.listen()  # a client that connects before the server is ready waits
    return listener


def call_at_eof(callback: Callable[[], None]) -> None:
    """Wait for the end of standard input, then call `callback`."""
    import os

    while os.read(0, 4096):  # not sys.stdin: this process would wait for its lock when it exits
        pass
    callback()


def lower_priority() -> None:
    """Lower the priority of this process below that of a training run: CPU time and, on Linux, the OOM killer."""
    import os

    with contextlib.suppress(AttributeError, OSError):
        os.nice(10)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


@contextlib.contextmanager
def beside(out_dir: "Path") -> Iterator[Callable[[], None]]:
    """Serve the page of the run in `out_dir` in a separate process, until the block or this process ends.

    Yields a function that prints the page's address, or a warning that says why there is no page. The run continues.
    """
    from llm.machine.interpreter import child_environment

    command = [sys.executable, "-m", "llm", "watch", "--until_eof", "--", str(out_dir)]
    try:
        page = subprocess.Popen(
            command,
            env=child_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the training
        )
    except OSError as error:
        reason = str(error.strerror)
        yield lambda: warn_no_page(reason)
        return
    assert page.stdin
    assert page.stdout
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_lines, args=(page.stdout, lines), daemon=True).start()
    try:
        yield lambda: _print_address(lines)
    finally:
        page.stdin.close()
        try:
            page.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            page.kill()
            page.wait()


def _read_lines(output: IO[bytes], lines: "queue.SimpleQueue[str]") -> None:
    """Put the page's lines into `lines`. Reads to the end, because a full pipe would block the page."""
    with output:
        for line in output:
            lines.put(line.decode(errors="replace").strip())
    lines.put("error: its server ended at once")


def _print_address(lines: "queue.SimpleQueue[str]") -> None:
    """Print the line with the page's address, or a warning if it does not come within PATIENCE."""
    from llm.commands.bars import print_best_effort

    try:
        line = lines.get(timeout=PATIENCE)
        while not line.startswith(("watching ", "error: ")):  # a warning of some library
            line = lines.get(timeout=PATIENCE)
    except queue.Empty:
        line = f"error: its server printed nothing within {PATIENCE} s"
    if line.startswith("watching "):
        print_best_effort(line)
    else:
        warn_no_page(line.removeprefix("error: "))


def warn_no_page(reason: str) -> None:
    """Warn that there is no page."""
    warn(f"no page: {reason}; training goes on without it")
