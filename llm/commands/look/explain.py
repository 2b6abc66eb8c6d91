"""`explain RUN`: what the record of a run shows, and what to try."""

from llm.commands.flags import Parser


def main(argv: list[str]) -> int:
    parser = Parser("losscurve explain", "Explain a run's record: the most important facts first, and what to try.")
    parser.add_run()
    args = parser.read(argv)

    from llm.commands.bars import print_result
    from llm.record.bands import band_of_run
    from llm.record.explain import explain
    from llm.record.metrics import read_record
    from llm.record.runs import origin_lines
    from llm.weights import run_config

    rows = read_record(args.run)
    lines = origin_lines(args.run) + explain(rows, run_config(args.run), band_of_run(args.run))
    print_result("\n".join(lines) or f"nothing to report in the {len(rows):,} rows of {args.run}")
    return 0
