"""`memorised RUN`: how much of a model's samples occurs verbatim in its training text."""

import argparse
import math
from typing import TYPE_CHECKING

from llm.commands.flags import Parser, add_settings, typed_settings
from llm.config import from_settings
from llm.errors import UserError

if TYPE_CHECKING:
    from llm.tokens.token_files import Tokens
    from llm.tokens.tokenizer import Ids, Tokenizer

DESCRIPTION = "Draw samples and search for them in the training text. Print the share that occurs there verbatim and \
the longest such passage; for comparison, the same for the validation text, which the model was not trained on."

N = 8  # tokens of an n-gram: few enough to occur, enough to be rare by chance

EXPLANATION = (
    "seen: occurs verbatim in the training text. A model that learned the language has about as large a share, and "
    "passages about as long, as the validation text; much more means that it memorised the training text."
)


def main(argv: list[str]) -> int:
    args = parse(argv)
    config = from_settings(typed_settings(args))
    temperatures = [parse_temperature(word) for word in args.temperatures.split(",")]
    for name in ("num_samples", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"{name} = {getattr(args, name)}: expected 1 or more")

    from llm.checks.memorised import draw, run_tokens, spread_windows
    from llm.commands.bars import print_result
    from llm.commands.flags import warn
    from llm.machine.device import choose_device, choose_dtype, precision
    from llm.run import Run
    from llm.start.texts import run_tokenizer

    device = choose_device(config.device)
    run = Run.open(args.run)
    data = run_tokens(run, config.data_dir, warn)
    tokenizer = run_tokenizer(run.path, run.config.model.vocab_size, warn)
    model = run.model(args.weights, str(device))
    prompt = run.config.sample_prompt or "\n"
    size = (args.num_samples, args.max_new_tokens)
    print_result(f"{size[0]} samples of {size[1]} tokens, searched for in {len(data.train):,} training tokens")
    for temperature in temperatures:
        with precision(choose_dtype(config.dtype, device), device):
            samples = draw(model, data, tokenizer, prompt, size, config.seed, temperature)
        print_result(f"temperature {temperature:<7g} | {describe(samples, data.train, tokenizer)}")
    windows = spread_windows(data.val, *size)
    print_result(f"validation text     | {describe(windows, data.train, tokenizer)}")
    if windows.shape != size:
        print_result(f"(the validation text is short: {windows.shape[0]} x {windows.shape[1]} tokens of it)")
    print_result(EXPLANATION)
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the parsed flags."""
    parser = Parser("losscurve memorised", DESCRIPTION)
    parser.add_run()
    parser.add_argument("--weights", choices=("last", "best"), default="last", help="model.pt or best.pt")
    parser.add_argument("--num_samples", type=int, default=10, metavar="N", help="for each temperature (default: 10)")
    parser.add_argument("--max_new_tokens", type=int, default=200, metavar="N", help="of each sample (default: 200)")
    parser.add_argument("--temperatures", default="0.5,0.8,1.0", metavar="T,T…", help="default: 0.5,0.8,1.0")
    add_settings(parser, ["data_dir", "seed", "device", "dtype"])
    return parser.read(argv)


def parse_temperature(word: str) -> float:
    """Return one number of `--temperatures`. Raises UserError if it is not a temperature."""
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"temperatures: {word!r} is not a temperature; expected numbers such as 0.5,0.8,1.0")
    return value


def describe(samples: "Ids", tokens: "Tokens", tokenizer: "Tokenizer | None") -> str:
    """Describe how much of `samples` (S, T) occurs in `tokens` (N,): the share and the longest passage."""
    from llm.checks.memorised import longest_seen, share_seen

    share = share_seen(samples, tokens, N)
    longest = longest_seen(samples, tokens)
    shown_share = f"too short for {N}-grams" if share is None else f"{share:6.1%} of {N}-grams seen"
    if longest.length == 0:
        return f"{shown_share} | no token of it seen"
    ids = tokens[longest.place : longest.place + longest.length]
    text = repr(tokenizer.decode(ids)) if tokenizer else " ".join(map(str, ids.tolist()))
    return f"{shown_share} | longest {longest.length} tokens, at training token {longest.place:,}: {text}"
