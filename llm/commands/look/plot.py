"""`plot RUN [RUN …]`: the loss curve of one run, or of several together, as a picture."""

from pathlib import Path

from llm.commands.flags import Parser, input_path, path


def main(argv: list[str]) -> int:
    parser = Parser("losscurve plot", "Draw the loss curve of one run, or of several together, from their records.")
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", type=input_path, help="run folder (the --out_dir of a training)"
    )
    parser.add_argument(
        "--out", metavar="FILE", type=path, help="picture to write: .png, .svg, .pdf … (default: RUN/loss_curve.png)"
    )
    args = parser.read(argv)
    from llm.record.plot import plot_runs

    out = args.out or (args.runs[0] / "loss_curve.png" if len(args.runs) == 1 else Path("loss_curves.png"))
    plot_runs(args.runs, out)
    print(f"wrote {out}")
    return 0
