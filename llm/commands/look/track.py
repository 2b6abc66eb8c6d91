"""`track RUN --to TRACKER`: send a recorded run to TensorBoard or W&B."""

from llm.commands.flags import Parser

DESCRIPTION = "Send a whole run to TensorBoard or W&B from its record: a run that was trained without a tracker, or \
whose tracker failed. It replaces what the tracker had of the run. losscurve train --track follows a run as it trains."


def main(argv: list[str]) -> int:
    parser = Parser("losscurve track", DESCRIPTION)
    parser.add_run()
    parser.add_argument(
        "--to", action="append", required=True, metavar="tensorboard|wandb", help="several, separated by commas"
    )
    args = parser.read(argv)

    from llm.commands.bars import print_result
    from llm.commands.flags import warn
    from llm.record.trackers import replay, starts
    from llm.weights import run_config

    config = run_config(args.run)
    for name, start in starts(args.to, warn).items():
        print_result(f"{name}: {replay(args.run, config, name, start)}")
    return 0
