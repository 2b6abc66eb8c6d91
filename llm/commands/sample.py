"""`sample`: a trained model continues a prompt. The text is printed token by token."""

import argparse
import re
import sys
from collections.abc import Collection, Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from llm.commands.flags import Parser, add_settings, path, typed_settings, warn
from llm.commands.streams import escape_bytes
from llm.config import TrainConfig, expanded, from_settings
from llm.errors import UserError
from llm.text.recognise import decode

if TYPE_CHECKING:
    import torch

    from llm.arch import Model
    from llm.tokens.tokenizer import Tokenizer

BETWEEN_SAMPLES = "---------------"
BETWEEN_PROMPTS = "==============="
DEFAULT_PROMPT = "ROMEO:"  # the chapter's

Prompts = dict[str, str]  # what a message calls a prompt: the prompt


def main(argv: list[str]) -> int:
    args = parse_flags(argv)
    given = typed_settings(args)
    # a .pt file tells its sizes; n_embd is only set to be divisible by n_head
    config = from_settings(given | {"n_embd": given.get("n_head", 4)})
    prompts = read_prompts(args)
    check_flags(args, prompts)

    from llm.generate import Knobs, check_knobs, check_stop, write
    from llm.machine.device import choose_device, choose_dtype, precision
    from llm.tokens.tokenizer import encode_prompt

    knobs: Knobs = {name: getattr(args, name) for name in Knobs.__annotations__}  # type: ignore[assignment]
    check_knobs(args.max_new_tokens, **knobs)
    check_stop(args.stop)
    device = choose_device(config.device)
    model, tokenizer, default_prompt = load(args, config, device)
    prompts = prompts or {"prompt": default_prompt}
    for label, prompt in prompts.items():
        encode_prompt(tokenizer, prompt, label)  # raises before anything is drawn
    seed = config.seed if "seed" in given else None
    # On a CPU, sampling is limited by memory bandwidth: bfloat16 would only add conversions (docs/performance.md).
    # One precision for any number of samples makes the first of several equal to a sample drawn alone.
    is_float32 = config.dtype == "auto" and device.type == "cpu"
    with precision(choose_dtype("float32" if is_float32 else config.dtype, device), device):
        how = (args.max_new_tokens, seed, args.num_samples, args.stop, args.ignore_end)
        streams = [write(model, tokenizer, prompt, *how, **knobs) for prompt in prompts.values()]
        for number, (prompt, pieces) in enumerate(zip(prompts.values(), streams, strict=True)):
            if number > 0:
                print(BETWEEN_PROMPTS)
            print_samples(prompt, pieces, args.num_samples, args.stream)
    return 0


def parse_flags(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        "losscurve sample",
        "Let a trained model continue a prompt. The defaults are the chapter's.",
        bare=("out_dir", "prompt"),
    )
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", metavar="TEXT", help="default: the run's own; ROMEO: for the chapter's text")
    prompts.add_argument(
        "--prompt_file", metavar="PATH", type=expanded, help="read the prompt from a file, or - for standard input"
    )
    prompts.add_argument(
        "--prompts",
        metavar="PATH",
        type=expanded,
        help="read several prompts from a file, or - as above: each line is one, empty lines are skipped",
    )
    parser.add_argument("--max_new_tokens", type=int, default=100, metavar="N", help="tokens to draw (default: 100)")
    add_knobs(parser)
    parser.add_argument("--num_samples", type=int, default=1, metavar="N", help="continuations to draw (default: 1)")
    parser.add_argument(
        "--stream",
        action="store_true",
        default=True,
        help="print the first sample while it is drawn (default); the others are drawn with it, and follow",
    )
    parser.add_argument("--no_stream", dest="stream", action="store_false", help="print samples when all are complete")
    parser.add_argument("--weights", choices=("last", "best"), default="last", help="model.pt or best.pt")
    parser.add_argument(
        "--checkpoint",
        metavar="FILE|DIR|NAME",
        type=path,
        help="instead of a run: a checkpoint in one (step-000500), a state_dict saved by torch.save, a GGUF file, a "
        "model in Hugging Face's format, or its name",
    )
    parser.add_argument(
        "--seed", default=argparse.SUPPRESS, metavar="SEED", help="seed of the drawing (default: another each time)"
    )
    add_settings(parser, ["out_dir", "device", "dtype", "n_head", "gelu"])
    return parser.read(argv)


def add_knobs(parser: Parser) -> None:
    """Add the flags that say how a token is drawn, and where a continuation ends."""
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 is greedy (default: 1)")
    parser.add_argument("--top_k", type=int, metavar="K", help="draw from the K most likely tokens only")
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the most likely tokens whose probabilities add up to P",
    )
    parser.add_argument(
        "--min_p", type=float, default=0.0, metavar="P", help="draw no token below P times the likeliest's probability"
    )
    parser.add_argument(
        "--repetition_penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: make tokens less likely that stand in the prompt or were drawn (default: 1)",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end a continuation before this text; may be given several times",
    )
    parser.add_argument(
        "--ignore_end", action="store_true", help="go on after end-of-text, where a continuation otherwise ends"
    )


def check_flags(args: argparse.Namespace, prompts: Prompts) -> None:
    """Raise UserError for flags that cannot work or do not go together."""
    if args.prompt and re.search("[\ud800-\udfff]", args.prompt):  # lone surrogates: bytes that are not UTF-8
        raise UserError(
            f"the argument --prompt is not valid UTF-8 ({escape_bytes(args.prompt)[:80]}); type it in a UTF-8 "
            "terminal, or write it to a file, in UTF-8, and give --prompt_file"
        )
    if "" in prompts.values():
        raise UserError("prompt = '': expected at least one character")
    if not args.checkpoint and (hasattr(args, "n_head") or hasattr(args, "gelu")):
        raise UserError("n_head and gelu are for a bare --checkpoint; a run has its own, so leave them out")
    if args.checkpoint and hasattr(args, "out_dir"):
        raise UserError(
            f"out_dir = {args.out_dir!r} is a run, and checkpoint = {str(args.checkpoint)!r} stands instead of one; "
            "leave one of them out"
        )
    if args.checkpoint and args.weights != "last":
        raise UserError("weights chooses between the files of a run; with --checkpoint leave it out")
    if args.num_samples < 1:
        raise UserError(f"num_samples = {args.num_samples}: expected 1 or more")


def load(args: argparse.Namespace, config: TrainConfig, device: "torch.device") -> "tuple[Model, Tokenizer, str]":
    """Return the model and tokenizer of a run or of a `--checkpoint`, and the default prompt."""
    from llm.run import Run
    from llm.tokens.tokenizer import first_readable

    if args.checkpoint:
        model, tokenizer = load_weights(str(args.checkpoint), config, typed_settings(args), device)
        return model, tokenizer, first_readable(tokenizer, (DEFAULT_PROMPT, "\n")) or tokenizer.decode([0])
    run = Run.open(config.out_dir)
    prompt = run.config.sample_prompt
    return run.model(args.weights, str(device)), run.tokenizer, DEFAULT_PROMPT if prompt is None else prompt


def load_weights(
    source: str, config: TrainConfig, typed: Collection[str], device: "torch.device"
) -> "tuple[Model, Tokenizer]":
    """Return the model and tokenizer of a .pt file or of another program's model. Raises UserError.

    `typed`: the names of the settings that were given. Where nothing says which tokens the model has, they are taken
    for GPT-2's, with a warning.
    """
    from llm.tokens.bpe import gpt2
    from llm.weights import open_weights

    opened = open_weights(source, config.model, typed=typed)
    if opened.tokenizer is None and not opened.is_ours:
        heads = f" and {opened.config.n_head} heads" if opened.path.is_file() else ""
        warn(f"{source}: has no tokenizer beside it, so GPT-2's tokens{heads} are assumed")
    return opened.model(device), opened.tokenizer or gpt2()


def print_samples(prompt: str, pieces: "Iterable[list[str]]", count: int, stream: bool) -> None:
    """Print `count` samples: a prompt and its continuation. To `stream` is to print the first while it is drawn."""
    streamed = int(stream)
    held: list[list[str]] = [[] for _ in range(count - streamed)]  # the pieces of the other samples
    for row in chain([[prompt] * count], pieces):
        if stream:
            print(row[0], end="", flush=True)
        for parts, piece in zip(held, row[streamed:], strict=True):
            parts.append(piece)
    if stream:
        print()
    for number, parts in enumerate(held, streamed):
        if number > 0:
            print(BETWEEN_SAMPLES)
        print("".join(parts))


def read_prompts(args: argparse.Namespace) -> Prompts:
    """Return the prompts of the flags; none if they say nothing. Raises UserError."""
    if args.prompts:
        lines = _read(args.prompts, "prompts").replace("\r\n", "\n").split("\n")
        prompts = {f"prompts {args.prompts}, line {number}": line for number, line in enumerate(lines, 1) if line}
        if not prompts:
            raise UserError(f"prompts {args.prompts}: holds no prompt; write one a line")
        return prompts
    if args.prompt_file:
        return {f"prompt_file {args.prompt_file}": _read(args.prompt_file, "prompt_file")}
    return {} if args.prompt is None else {"prompt": args.prompt}


def _read(source: str, flag: str) -> str:
    """Return the text of a file, or of standard input for "-". Raises UserError."""
    try:
        content = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise UserError(f"{flag} {source}: cannot be read ({error.strerror})") from None
    return decode(content, f"{flag} {source}", "" if source == "-" else source)
