"""`plot RUN [RUN …]`: draw the loss curves of one or several runs into a picture."""

from pathlib import Path

from llm.commands.flags import Parser, input_path, path


def main(argv: list[str]) -> int:
    parser = Parser("losscurve plot", "Draw the loss curve of one run, or of several in one picture, from the records.")
    parser.add_argument("runs", nargs="+", metavar="RUN", type=input_path, help="run folder (the --out_dir of a run)")
    parser.add_argument(
        "--out", metavar="FILE", type=path, help="picture to write: .png, .svg, .pdf … (default: RUN/loss_curve.png)"
    )
    args = parser.read(argv)

    from llm.record.plot import plot_runs

    default = args.runs[0] / "loss_curve.png" if len(args.runs) == 1 else Path("loss_curves.png")
    out = args.out or default
    plot_runs(args.runs, out)
    print(f"wrote {out}")
    return 0
