"""`sample`: a trained model continues a prompt. The text is printed token by token."""

import argparse
import re
import sys
from collections.abc import Iterable
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
    from llm.tokens.writing import Writing

SEPARATOR = "---------------"
DEFAULT_PROMPT = "ROMEO:"  # the chapter's


def main(argv: list[str]) -> int:
    args = parse_flags(argv)
    config = from_settings(typed_settings(args))
    prompts = read_prompts(args)
    check_flags(args, prompts)

    from llm.generate import check_knobs, continue_text
    from llm.machine.device import choose_device, choose_dtype, precision
    from llm.tokens.writing import Writing

    knobs = (args.temperature, args.top_k, args.top_p)
    more = {"min_p": args.min_p, "repetition_penalty": args.repetition_penalty}
    check_knobs(args.max_new_tokens, *knobs, **more)
    device = choose_device(config.device)
    model, tokenizer, default_prompt = load(args, config, device)
    seed = config.seed if hasattr(args, "seed") else None
    # On a CPU, sampling is limited by memory bandwidth: bfloat16 would only add conversions (docs/performance.md).
    # One precision for any number of samples makes the first of several equal to a sample drawn alone.
    is_float32 = config.dtype == "auto" and device.type == "cpu"
    with precision(choose_dtype("float32" if is_float32 else config.dtype, device), device):
        prompts = prompts or [default_prompt]
        size = (args.max_new_tokens, seed, args.num_samples)
        streams = [continue_text(model, tokenizer, prompt, *size, *knobs, **more) for prompt in prompts]
        for number, (prompt, tokens) in enumerate(zip(prompts, streams, strict=True)):
            if number > 0:
                print(SEPARATOR)
            print_samples(prompt, tokens, [Writing(tokenizer, args.stop, args.ignore_end) for _ in range(size[2])])
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
        "--prompts", metavar="PATH", type=expanded, help="read several prompts from a file, one a line, or - as above"
    )
    parser.add_argument("--max_new_tokens", type=int, default=100, metavar="N", help="tokens to draw (default: 100)")
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
    parser.add_argument("--num_samples", type=int, default=1, metavar="N", help="continuations to draw (default: 1)")
    parser.add_argument("--weights", choices=("last", "best"), default="last", help="model.pt or best.pt")
    parser.add_argument(
        "--checkpoint",
        metavar="FILE|DIR|NAME",
        type=path,
        help="instead of a run: a state_dict saved by torch.save, a GGUF file, a model in Hugging Face's format, or "
        "its name",
    )
    parser.add_argument(
        "--seed", default=argparse.SUPPRESS, metavar="SEED", help="seed of the drawing (default: another each time)"
    )
    add_settings(parser, ["out_dir", "device", "dtype", "n_head", "gelu"])
    return parser.read(argv)


def check_flags(args: argparse.Namespace, prompts: list[str]) -> None:
    """Raise UserError for flags that cannot work or do not go together."""
    if args.prompt and re.search("[\ud800-\udfff]", args.prompt):  # lone surrogates: bytes that are not UTF-8
        raise UserError(
            f"the argument --prompt is not valid UTF-8 ({escape_bytes(args.prompt)[:80]}); type it in a UTF-8 "
            "terminal, or write it to a file, in UTF-8, and give --prompt_file"
        )
    if "" in prompts:
        raise UserError("prompt = '': expected at least one character")
    if "" in args.stop:
        raise UserError("stop = '': expected at least one character")
    if not args.checkpoint and (hasattr(args, "n_head") or hasattr(args, "gelu")):
        raise UserError("n_head and gelu are for a bare --checkpoint; a run has its own, so leave them out")
    if args.checkpoint and args.weights != "last":
        raise UserError("weights chooses between the files of a run; with --checkpoint leave it out")
    if args.num_samples < 1:
        raise UserError(f"num_samples = {args.num_samples}: expected 1 or more")


def load(args: argparse.Namespace, config: TrainConfig, device: "torch.device") -> "tuple[Model, Tokenizer, str]":
    """Return the model and tokenizer of a run or of a `--checkpoint`, and the default prompt."""
    from llm.run import Run

    if args.checkpoint:
        typed = hasattr(args, "n_head") or hasattr(args, "gelu")
        model, tokenizer = load_weights(str(args.checkpoint), config.model.n_head, config.model.gelu, typed, device)
        return model, tokenizer, DEFAULT_PROMPT
    run = Run.open(config.out_dir)
    prompt = run.config.sample_prompt
    return run.model(args.weights, str(device)), run.tokenizer, DEFAULT_PROMPT if prompt is None else prompt


def print_samples(prompt: str, tokens: "Iterable[list[int]]", writings: "list[Writing]") -> None:
    """Print a prompt and its continuation as the tokens arrive; several are drawn together, and printed after that."""
    alone = len(writings) == 1
    texts = [""] * len(writings)
    if alone:
        print(prompt, end="", flush=True)
    for row in tokens:
        for number, (writing, token) in enumerate(zip(writings, row, strict=True)):
            text = writing.add(token)
            if alone:
                print(text, end="", flush=True)
            else:
                texts[number] += text
        if all(writing.ended for writing in writings):
            break
    for number, (writing, text) in enumerate(zip(writings, texts, strict=True)):
        if number > 0:
            print(SEPARATOR)
        print("" if alone else prompt + text, end="")
        print(writing.rest())


def load_weights(source: str, n_head: int, gelu: str, typed: bool, device: "torch.device") -> "tuple[Model, Tokenizer]":
    """Return the model and tokenizer of a .pt file or of another program's model. Raises UserError.

    `typed`: whether `n_head` or `gelu` were given; weights that tell their own refuse them. Where nothing says which
    tokens they are, they are taken for GPT-2's, with a warning.
    """
    from llm.tokens.bpe import gpt2
    from llm.weights import open_weights

    # the file gives the sizes; n_embd is only set to be divisible by n_head
    opened = open_weights(source, from_settings({"n_head": n_head, "gelu": gelu, "n_embd": n_head}).model)
    if typed and not opened.is_bare:
        raise UserError(f"n_head and gelu are for a bare state_dict; {source} has its own, so leave them out")
    if opened.tokenizer is None and not opened.is_ours:
        heads = f" and {opened.config.n_head} heads" if opened.path.is_file() else ""
        warn(f"{source}: has no tokenizer beside it, so GPT-2's tokens{heads} are assumed")
    return opened.model(device), opened.tokenizer or gpt2()


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Return the prompts of the flags; none if they say nothing. Raises UserError."""
    if args.prompts:
        lines = _read(args.prompts, "prompts").replace("\r\n", "\n").split("\n")
        prompts = [line for line in lines if line]
        if not prompts:
            raise UserError(f"prompts {args.prompts}: holds no prompt; write one a line")
        return prompts
    if args.prompt_file:
        return [_read(args.prompt_file, "prompt_file")]
    return [] if args.prompt is None else [args.prompt]


def _read(source: str, flag: str) -> str:
    """Return the text of a file, or of standard input for "-". Raises UserError."""
    try:
        content = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise UserError(f"{flag} {source}: cannot be read ({error.strerror})") from None
    return decode(content, f"{flag} {source}", "" if source == "-" else source)
