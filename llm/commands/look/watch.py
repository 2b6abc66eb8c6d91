"""`watch [RUN …]`: a page in the browser that follows runs as they go. `train --watch` has it beside the training."""

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from llm.commands.flags import Parser, input_path, warn
from llm.errors import Failure, UserError

DESCRIPTION = "Serve a page on this machine that follows one or several runs as they go: curves, samples, the \
learning-rate slider and a playground. It only reads the run folders; a folder without a run is waited for."


PATIENCE = 10  # seconds that a training run waits for the page's address


def main(argv: list[str]) -> int:
    parser = Parser("losscurve watch", DESCRIPTION)
    parser.add_argument(
        "runs",
        nargs="*",
        type=input_path,
        default=[Path("checkpoints")],
        metavar="RUN",
        help="run folders (default: checkpoints)",
    )
    parser.add_argument("--port", type=int, default=0, metavar="PORT", help="on 127.0.0.1 (default: a free one)")
    parser.add_argument("--until_eof", action="store_true", help="end where standard input ends (for other programs)")
    args = parser.read(argv)
    if not 0 <= args.port < 65536:
        raise UserError(f"port = {args.port}: expected 0 to 65535")

    import os
    import secrets
    import socket
    import threading

    from llm.commands.bars import print_result

    try:
        from llm.page.server import Server, plotly_script
    except ModuleNotFoundError as error:
        raise UserError(f'the page needs {error.name}; pip install "losscurve[dashboard]"') from None
    plotly_script()
    for name in args.runs:
        if name.exists() and not name.is_dir():
            raise UserError(f"{name}: not a folder; give the --out_dir of a training run")
        if not args.until_eof and not (name / "metrics.jsonl").exists():
            warn(f"{name}: no run there yet; the page waits for one")
    give_way()
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", args.port))
        except OSError as error:
            raise Failure(f"port {args.port}: {error.strerror}; give another --port, or none") from None
        listener.listen()  # who comes before the server is ready waits
        port, token = listener.getsockname()[1], secrets.token_urlsafe(24)
        server = Server(args.runs, token, port)

        def wait_for_eof() -> None:
            while os.read(0, 4096):  # no lock of sys.stdin, which the end of this process would wait for
                pass
            server.should_exit = True

        if args.until_eof:
            threading.Thread(target=wait_for_eof, daemon=True).start()
        again = f"losscurve watch {' '.join(shlex.quote(str(name)) for name in args.runs)}"
        end = f"it ends with the run; {again} opens it again" if args.until_eof else "Ctrl-C ends it"
        with contextlib.suppress(KeyboardInterrupt):
            print_result(f"watching {', '.join(map(str, args.runs))} at http://127.0.0.1:{port}/{token}/ ({end})")
            server.run(sockets=[listener])
    return 0


def give_way() -> None:
    """Let a training run go first: for the processor, and where memory runs out (Linux)."""
    import os

    with contextlib.suppress(AttributeError, OSError):
        os.nice(10)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


@contextlib.contextmanager
def beside(out_dir: "Path") -> Iterator[Callable[[], None]]:
    """The page of the run in `out_dir`, served by a process of its own until the block ends, or this process does,
    however it ends. Yields what tells its address, or in one line why there is none; that is no error of the run.
    """
    import queue
    import subprocess
    import threading

    from llm.commands.bars import print_best_effort
    from llm.machine.interpreter import child_environment

    command = [sys.executable, "-m", "llm", "watch", "--until_eof", "--", str(out_dir)]
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    try:  # in a session of its own: Ctrl-C is for the training
        env = child_environment()
        page = subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=both, start_new_session=True)
    except OSError as error:
        reason = str(error.strerror)
        yield lambda: no_page(reason)
        return
    assert page.stdin
    assert page.stdout
    said = page.stdout

    def listen() -> None:
        with said:
            for line in said:  # to the end, so that it never waits to be heard
                lines.put(line.decode(errors="replace").strip())
        lines.put("error: its server ended at once")

    threading.Thread(target=listen, daemon=True).start()

    def tell_address() -> None:
        try:
            while not (line := lines.get(timeout=PATIENCE)).startswith(("watching ", "error: ")):
                pass  # a warning of some library
        except queue.Empty:
            line = f"error: its server said nothing within {PATIENCE} s"
        if line.startswith("watching "):
            print_best_effort(line)
        else:
            no_page(line.removeprefix("error: "))

    try:
        yield tell_address
    finally:
        page.stdin.close()
        try:
            page.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            page.kill()
            page.wait()


def no_page(reason: str) -> None:
    warn(f"no page: {reason}; training goes on without it")
