"""`report RUN`: a run as one file to share: HTML, or Markdown with pictures beside it."""

from llm.commands.flags import Parser, input_path, path
from llm.config import expanded

DESCRIPTION = "Write a run as one HTML file that opens anywhere, without a network: curves, samples over time, what \
stands in the training text word for word, data, settings, environment. Or as Markdown with pictures."


def main(argv: list[str]) -> int:
    parser = Parser("losscurve report", DESCRIPTION)
    parser.add_argument(
        "run",
        nargs="?",
        default="checkpoints",
        metavar="RUN",
        type=input_path,
        help="run folder (default: checkpoints)",
    )
    parser.add_argument("--format", choices=("html", "md"), default="html", help="default: html")
    parser.add_argument(
        "--out", metavar="FILE", type=path, help="default: RUN/report.html, or RUN/report/report.md and its pictures"
    )
    parser.add_argument("--data_dir", metavar="DIR", type=expanded, help="the run's token files, if they have moved")
    parser.add_argument("--no_memorised", action="store_true", help="draw no samples to look for in the training text")
    args = parser.read(argv)

    from llm.commands.bars import print_result
    from llm.commands.flags import warn
    from llm.report.gather import gather
    from llm.report.write_html import write_html
    from llm.report.write_markdown import write_markdown

    write, usual = (write_html, "report.html") if args.format == "html" else (write_markdown, "report/report.md")
    report = gather(args.run, args.data_dir, memorised=not args.no_memorised, say=warn)
    if report.card.trouble:
        warn(report.card.trouble)
    out = args.out or args.run / usual
    write(report, out)
    print_result(f"wrote {out} ({out.stat().st_size / 2**20:.2f} MiB)")
    return 0
