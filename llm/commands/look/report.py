"""`report RUN`: write a run as one file to share: HTML, or Markdown with its pictures in files."""

from llm.commands.flags import Parser, path
from llm.config import expanded
from llm.errors import UserError

DESCRIPTION = "Write a run as one HTML file that opens anywhere, without a network: curves, samples over time, what \
occurs verbatim in the training text, data, settings, environment. Or as Markdown with pictures. Of a try: its table, \
its curves and its best setting."


def main(argv: list[str]) -> int:
    parser = Parser("losscurve report", DESCRIPTION)
    parser.add_run()
    parser.add_argument("--format", choices=("html", "md"), default="html", help="default: html")
    parser.add_argument(
        "--out", metavar="FILE", type=path, help="default: RUN/report.html, or RUN/report/report.md and its pictures"
    )
    parser.add_argument("--data_dir", metavar="DIR", type=expanded, help="the run's token files, if they have moved")
    parser.add_argument("--no_memorised", action="store_true", help="do not search the training text for samples")
    args = parser.read(argv)

    from llm.commands.bars import print_result
    from llm.commands.flags import warn

    if (args.run / "try.json").exists():
        from llm.report.write_try import write_try

        if args.format != "html":
            raise UserError(f"{args.run}: is a try, whose report is HTML; leave --format {args.format} out")
        if args.data_dir or args.no_memorised:
            unused = "--data_dir" if args.data_dir else "--no_memorised"
            raise UserError(f"{args.run}: is a try, whose report reads no training text; leave {unused} out")
        out = args.out or args.run / "report.html"
        write_try(args.run, out)
        print_result(f"wrote {out} ({out.stat().st_size / 2**20:.2f} MiB)")
        return 0

    from llm.report.gather import gather
    from llm.report.write_html import write_html
    from llm.report.write_markdown import write_markdown

    report = gather(args.run, args.data_dir, memorised=not args.no_memorised, say=warn)
    if report.card.trouble:
        warn(report.card.trouble)
    if args.format == "html":
        out = args.out or args.run / "report.html"
        write_html(report, out)
    else:
        out = args.out or args.run / "report" / "report.md"
        write_markdown(report, out)
    print_result(f"wrote {out} ({out.stat().st_size / 2**20:.2f} MiB)")
    return 0
