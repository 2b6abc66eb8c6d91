"""The memorisation part of a report: how much of what a model generates its training text contains word for word."""

import math

from llm.checks.memorised import draw, longest_seen, share_seen, spread_windows
from llm.data import TokenData
from llm.errors import UserError
from llm.machine.device import choose_device, choose_dtype, precision
from llm.report.facts import Memorisation, Overlap
from llm.report.words import SYMBOLS, shorten_folders, show_controls
from llm.run import Run
from llm.tokens.token_files import Tokens
from llm.tokens.tokenizer import Ids, Tokenizer

TEMPERATURES = (0.5, 0.8, 1.0)
N = 8  # tokens of an n-gram: few enough to occur, enough to be rare by chance
GENERATED = 2000  # tokens generated at each temperature, about
MAX_TRAIN_TOKENS = 10**8  # searching more takes longer than a report should
PASSAGE = 300  # characters of the longest passage that are printed


def measure_memorisation(run: Run, data: TokenData | str, tokenizer: Tokenizer | None) -> Memorisation | str:
    """Generate samples with the best weights, or else the last, and search for them in the training text.

    A string explains why that was not possible.
    """
    if isinstance(data, str):
        return f"Not measured: {data}"
    if len(data.train) > MAX_TRAIN_TOKENS:
        return f"Not measured: searching {len(data.train):,} training tokens takes long; run losscurve memorised."
    file = next((name for name in ("best.pt", "model.pt") if (run.path / name).is_file()), None)
    if file is None:
        return "Not measured: no weights are saved yet."
    prompt = run.config.sample_prompt or "\n"
    try:
        model = run.model("best" if file == "best.pt" else "last")
        prompt_length = len(tokenizer.encode(prompt)) if tokenizer else 1
    except UserError as error:
        return f"Not measured: {shorten_folders(str(error), run)}"

    length = min(200, max(32, run.config.model.block_size - prompt_length))  # inside the context, generation is fast
    size = (math.ceil(GENERATED / length), length)
    device = choose_device("auto")
    overlaps = []
    for temperature in TEMPERATURES:
        with precision(choose_dtype("auto", device), device):
            samples = draw(model, data, tokenizer, prompt, size, run.config.seed, temperature)
        overlaps.append(find_overlap(f"temperature {temperature:g}", samples, data.train, tokenizer))
    windows = spread_windows(data.val, *size)
    overlaps.append(find_overlap("validation text", windows, data.train, tokenizer))
    return Memorisation(weights=file, tokens=size[0] * size[1], overlaps=overlaps)


def find_overlap(source: str, samples: Ids, tokens: Tokens, tokenizer: Tokenizer | None) -> Overlap:
    """Return the share of the n-grams of `samples` (S, T) in `tokens` (N,), and the longest passage there."""
    share = share_seen(samples, tokens, N)
    longest = longest_seen(samples, tokens)
    ids = tokens[longest.place : longest.place + longest.length]
    text = tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids.tolist()))
    passage = show_controls(text[:PASSAGE]).replace("\n", SYMBOLS["\n"])
    if len(text) > PASSAGE:
        passage += "…"
    return Overlap(source, share, longest.length, passage)
