"""`watch [RUN …]`: a page in the browser that follows runs as they go."""

from llm.commands.flags import Parser
from llm.errors import Failure, UserError

DESCRIPTION = "Serve a page on this machine that follows one or several runs as they go: curves, samples, the \
learning-rate slider and a playground. It only reads the run folders; a folder without a run is waited for."


def main(argv: list[str]) -> int:
    parser = Parser("losscurve watch", DESCRIPTION)
    parser.add_argument(
        "runs", nargs="*", default=["checkpoints"], metavar="RUN", help="run folders (default: checkpoints)"
    )
    parser.add_argument("--port", type=int, default=0, metavar="PORT", help="on 127.0.0.1 (default: a free one)")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    args = parser.read(argv)
    if not 0 <= args.port < 65536:
        raise UserError(f"port = {args.port}: expected 0 to 65535")

    import secrets
    import socket
    from pathlib import Path

    from llm.commands.bars import tell

    try:
        import uvicorn

        from llm.page.server import app, plotly_script
    except ModuleNotFoundError as error:
        raise UserError(f'the page needs {error.name}; pip install "losscurve[dashboard]"') from None
    plotly_script()
    for name in args.runs:
        if Path(name).exists() and not Path(name).is_dir():
            raise UserError(f"{name}: not a folder; give the --out_dir of a training run")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", args.port))
        except OSError as error:
            raise Failure(f"port {args.port}: {error.strerror}; give another --port, or none") from None
        port, token = listener.getsockname()[1], secrets.token_urlsafe(24)
        address = f"http://127.0.0.1:{port}/?token={token}"
        tell(f"watching {', '.join(args.runs)} at {address} (Ctrl-C ends)")
        if args.open:
            import webbrowser

            webbrowser.open(address)
        settings = uvicorn.Config(
            app([Path(name) for name in args.runs], token, port),
            log_level="critical",  # open streams that are cut off at the end are no news
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        uvicorn.Server(settings).run(sockets=[listener])
    return 0
