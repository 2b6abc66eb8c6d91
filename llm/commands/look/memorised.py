"""`memorised RUN`: how much of what a model writes stands in its training text word for word."""

import math
from typing import TYPE_CHECKING

from llm.commands.flags import Parser, add_settings, input_path, typed_settings
from llm.config import from_settings
from llm.errors import UserError

if TYPE_CHECKING:
    from llm.tokens.token_files import Tokens
    from llm.tokens.tokenizer import Ids, Tokenizer


DESCRIPTION = "Draw samples and look for them in the training text: the share that stands there word for word, and \
the longest passage that does; beside them the validation text, which the model was not trained on."


N = 8  # tokens in a row: few enough to occur, enough to be rare by chance


MEANING = (
    "seen: stands in the training text word for word. A model that learned the language writes about as much of "
    "it, and passages about as long, as the validation text has; much more is learned by heart."
)


def main(argv: list[str]) -> int:
    parser = Parser("losscurve memorised", DESCRIPTION)
    parser.add_argument(
        "run",
        nargs="?",
        default="checkpoints",
        metavar="RUN",
        type=input_path,
        help="run folder (default: checkpoints)",
    )
    parser.add_argument("--weights", choices=("last", "best"), default="last", help="model.pt or best.pt")
    parser.add_argument("--num_samples", type=int, default=10, metavar="N", help="for each temperature (default: 10)")
    parser.add_argument("--max_new_tokens", type=int, default=200, metavar="N", help="of each sample (default: 200)")
    parser.add_argument("--temperatures", default="0.5,0.8,1.0", metavar="T,T…", help="default: 0.5,0.8,1.0")
    add_settings(parser, ["data_dir", "seed", "device", "dtype"])
    args = parser.read(argv)
    config = from_settings(typed_settings(args))
    temperatures = [temperature_of(word) for word in args.temperatures.split(",")]
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
    size, prompt = (args.num_samples, args.max_new_tokens), run.config.sample_prompt or "\n"
    print_result(f"{size[0]} samples of {size[1]} tokens, looked for in {len(data.train):,} training tokens")
    for heat in temperatures:
        with precision(choose_dtype(config.dtype, device), device):
            samples = draw(model, data, tokenizer, prompt, size, config.seed, heat)
        print_result(f"temperature {heat:<7g} | {compared(samples, data.train, tokenizer)}")
    usual = spread_windows(data.val, *size)
    print_result(f"validation text     | {compared(usual, data.train, tokenizer)}")
    if usual.shape != size:
        print_result(f"(the validation text is short: {usual.shape[0]} x {usual.shape[1]} tokens of it)")
    print_result(MEANING)
    return 0


def temperature_of(word: str) -> float:
    """A number of `--temperatures`. Raises UserError."""
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"temperatures: {word!r} is not a temperature; expected numbers such as 0.5,0.8,1.0")
    return value


def compared(samples: "Ids", tokens: "Tokens", tokenizer: "Tokenizer | None") -> str:
    """Share and longest passage of `samples` (S, T) that stand in `tokens`, in words."""
    from llm.checks.memorised import longest_seen, share_seen

    share, longest = share_seen(samples, tokens, N), longest_seen(samples, tokens)
    first = f"too short for {N}-grams" if share is None else f"{share:6.1%} of {N}-grams seen"
    if longest.length == 0:
        return f"{first} | no token of it seen"
    ids = tokens[longest.place : longest.place + longest.length]
    text = repr(tokenizer.decode(ids)) if tokenizer else " ".join(map(str, ids.tolist()))
    return f"{first} | longest {longest.length} tokens, at training token {longest.place:,}: {text}"
