"""`evaluate [WEIGHTS …]`: how well any weights predict any text, in figures that compare."""

import argparse
import contextlib
import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

from llm.commands.flags import Parser, add_settings, typed_settings, warn
from llm.config import expanded, from_settings
from llm.errors import UserError

if TYPE_CHECKING:
    from llm.checks.on_text import Score

DESCRIPTION = "Measure how well weights predict a text: those of runs, .pt files, GGUF files and models in Hugging \
Face's format; without --text, how well runs predict their validation split. Losses and perplexities compare models \
with the same tokens only; bits per byte compare any models on one text."


def main(argv: list[str]) -> int:
    args = parse(argv)
    given = typed_settings(args)
    # a .pt file tells its sizes; n_embd is only set to be divisible by n_head
    config = from_settings(given | {"n_embd": given.get("n_head", 4)})
    check_flags(args, given)

    from llm.checks.on_text import Task, score
    from llm.commands.bars import print_result, progress_bar
    from llm.machine.device import choose_device
    from llm.text import corpus
    from llm.weights import open_weights

    device = choose_device(config.device)
    scores = []
    with contextlib.ExitStack() as files:
        text = None
        if config.text:
            text = files.enter_context(corpus.opened(config.text, text_field=config.text_field))
            text = dataclasses.replace(text, name=", ".join(config.text))
        task = Task(text, args.window, args.stride, config.data_dir, given.get("dtype"))
        for source in args.sources:
            opened = open_weights(source, config.model, args.weights, given)
            if opened.tokenizer is None:
                warn(f"{source}: has no tokenizer beside it, so GPT-2's tokens are assumed")
            with progress_bar(f"evaluating {source}", patience=2) as show:
                found = score(opened, task, device, warn, show)
            if args.weights == "average":
                found = dataclasses.replace(found, weights=f"{found.weights} (average)")
            scores.append(found)
    print_result(as_json(scores) if args.json else table(scores))
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the parsed flags."""
    parser = Parser("losscurve evaluate", DESCRIPTION)
    parser.add_argument(
        "sources",
        nargs="*",
        type=expanded,
        default=["checkpoints"],
        metavar="WEIGHTS",
        help="a run folder, a checkpoint in one (step-000500), FILE.pt, FILE.gguf, a folder in Hugging Face's format "
        "or its name there (default: checkpoints)",
    )
    parser.add_argument(
        "--text",
        nargs="+",
        action="extend",
        default=argparse.SUPPRESS,
        metavar="PATH",
        help="what to predict: files, folders, - (standard input) or a name such as shakespeare (default: the "
        "validation split of each run)",
    )
    parser.add_argument(
        "--weights",
        choices=("last", "best", "average"),
        default="best",
        help="of a run: model.pt or best.pt; average: the average of the weights (--ema) in a checkpoint, instead of "
        "the weights",
    )
    parser.add_argument(
        "--window", type=int, metavar="N", help="tokens at once (default: a run's block_size; at most 1,024 of others)"
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="start a window every N tokens and count only its last N, so that each is predicted from more text "
        "(default: windows do not overlap, as in training)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default=argparse.SUPPRESS,
        help="precision of matrix products (default: float32; for a validation split the run's own)",
    )
    parser.add_argument(
        "--data_dir",
        type=expanded,
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="a run's token files, if they have moved",
    )
    parser.add_argument("--json", action="store_true", help="a JSON array with all facts, for other programs")
    add_settings(parser, ["text_field", "device", "n_head", "gelu"])
    return parser.read(argv)


def check_flags(args: argparse.Namespace, given: dict[str, Any]) -> None:
    """Raise UserError for flags that cannot work or do not go together."""
    for name in ("window", "stride"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"{name} = {getattr(args, name)}: expected 1 or more")
    if "text" in given and "data_dir" in given:
        raise UserError("data_dir has the validation split of a run; with --text, leave it out")


def as_json(scores: "list[Score]") -> str:
    """Return the scores as a JSON array. A figure that is no number is null."""
    rows = []
    for score in scores:
        figures = {"loss": score.found.loss, "perplexity": score.perplexity, "bits_per_byte": score.found.bits_per_byte}
        rows.append(
            {"weights": score.weights, "text": score.text}
            | {name: value if value is not None and math.isfinite(value) else None for name, value in figures.items()}
            | {"tokens": score.found.tokens, "bytes": score.found.bytes}
            | {"window": score.window, "stride": score.stride, "dtype": score.dtype}
        )
    return json.dumps(rows, indent=2)


def table(scores: "list[Score]") -> str:
    """Return the lines of a table with one row for each score."""
    from llm.commands.planning.tables import format_table

    titles = ("weights", "text", "nats/token", "perplexity", "bits/byte", "tokens", "bytes", "window", "precision")
    rows = []
    for score in scores:
        found = score.found
        rows.append(
            (
                score.weights,
                score.text,
                f"{found.loss:.4f}",
                f"{score.perplexity:,.2f}",
                "" if found.bits_per_byte is None else f"{found.bits_per_byte:.4f}",
                f"{found.tokens:,}",
                "" if found.bytes is None else f"{found.bytes:,}",
                f"{score.window:,}" if score.stride is None else f"{score.window:,} every {score.stride:,}",
                score.dtype,
            )
        )
    return format_table(titles, rows)
