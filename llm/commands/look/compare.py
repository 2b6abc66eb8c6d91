"""`compare RUN RUN …`: whether a setting is better than another, or the difference may be chance."""

from pathlib import Path

from llm.commands.flags import Parser, input_path, path
from llm.config import expanded
from llm.errors import UserError

DESCRIPTION = "Compare runs: what differs in their settings, how far their validation losses are apart at equal steps, \
tokens and seconds, and whether that is more than chance. Runs that differ in their seed only count as repetitions of \
one setting; every other setting is compared with that of the first run. Runs that still train are compared as far as \
they are."


def main(argv: list[str]) -> int:
    parser = Parser("losscurve compare", DESCRIPTION)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", type=input_path, help="run folder, or a folder with runs in or below it"
    )
    parser.add_argument(
        "--out", metavar="FILE", type=path, default=Path("comparison.png"), help="picture (default: comparison.png)"
    )
    parser.add_argument("--data_dir", metavar="DIR", type=expanded, help="the runs' token files, if they have moved")
    parser.add_argument(
        "--looks",
        type=int,
        default=1,
        metavar="N",
        help="how often you ask this question in all, as more seeds come in: keeps all false alarms together at 5 %%",
    )
    args = parser.read(argv)
    if args.looks < 1:
        raise UserError(f"looks = {args.looks}: expected 1 or more")

    import sys

    from llm.commands.bars import print_result
    from llm.commands.flags import warn
    from llm.experiments.compare import compare
    from llm.experiments.comparison_picture import draw_comparisons
    from llm.experiments.words import report_lines
    from llm.record.chart_style import save_figure

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    settings, comparisons, notes = compare(expand(args.runs), args.looks, args.data_dir, say=say)
    for note in notes:
        warn(note)
    print_result("\n".join(report_lines(settings, comparisons, args.looks)))
    if any(comparison.findings for comparison in comparisons):
        save_figure(lambda: draw_comparisons(settings, comparisons), args.out)
        print_result(f"wrote {args.out}")
    return 0


def expand(paths: list[Path]) -> list[Path]:
    """Return the run folders that are given, and those in and below the other folders, each once. Raises UserError."""
    from llm.record.runs import find

    found = []
    for given in paths:
        is_run = (given / "config.toml").is_file() or not given.is_dir()
        found += [given] if is_run else find(given)[0] or [given]
    return list(dict.fromkeys(found))
