"""`sample`: a trained model continues a prompt, and the text appears as it is made."""

import codecs
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from llm.commands.flags import Parser, add_settings, path, typed_settings, warn
from llm.commands.streams import readable
from llm.config import expanded, from_settings
from llm.errors import UserError
from llm.text.recognise import decode

if TYPE_CHECKING:
    from llm.model import GPT
    from llm.tokens.tokenizer import Tokenizer

SEPARATOR = "---------------"


def main(argv: list[str]) -> int:
    parser = Parser(
        "losscurve sample",
        "Let a trained model continue a prompt. Defaults: the chapter's.",
        bare=("out_dir", "prompt"),
    )
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", metavar="TEXT", help="default: the run's own, for the chapter's text ROMEO:")
    prompts.add_argument(
        "--prompt_file", metavar="PATH", type=expanded, help="read the prompt from a file, or - for standard input"
    )
    parser.add_argument("--max_new_tokens", type=int, default=100, metavar="N", help="tokens to make (default: 100)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 is greedy (default: 1)")
    parser.add_argument("--top_k", type=int, metavar="K", help="draw from the K likeliest tokens only")
    parser.add_argument(
        "--top_p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens that make up P"
    )
    parser.add_argument("--num_samples", type=int, default=1, metavar="N", help="continuations to make (default: 1)")
    parser.add_argument("--weights", choices=("last", "best"), default="last", help="model.pt or best.pt")
    parser.add_argument(
        "--checkpoint", metavar="FILE.pt", type=path, help="a state_dict saved by torch.save, instead of a run"
    )
    add_settings(parser, ["out_dir", "seed", "device", "dtype", "n_head", "gelu"])
    args = parser.read(argv)
    config = from_settings(typed_settings(args))
    prompt = read_prompt(args.prompt_file) if args.prompt_file else args.prompt
    if args.prompt and re.search("[\ud800-\udfff]", args.prompt):
        raise UserError(
            f"the argument --prompt is not valid UTF-8 ({readable(args.prompt)[:80]}); type it in a UTF-8 terminal, or "
            "write it to a file, in UTF-8, and give --prompt_file"
        )
    if prompt == "":
        raise UserError("prompt = '': expected at least one character")
    if not args.checkpoint and (hasattr(args, "n_head") or hasattr(args, "gelu")):
        raise UserError("n_head and gelu are for a bare --checkpoint; a run knows its own, so leave them out")
    if args.checkpoint and args.weights != "last":
        raise UserError("weights chooses between the files of a run; with --checkpoint leave it out")
    if args.num_samples < 1:
        raise UserError(f"num_samples = {args.num_samples}: expected 1 or more")

    from llm.generate import check_knobs, continue_text
    from llm.machine.device import choose_device, choose_dtype, precision
    from llm.run import Run

    check_knobs(args.max_new_tokens, args.temperature, args.top_k, args.top_p)
    device = choose_device(config.device)
    if args.checkpoint:
        model, tokenizer = bare_model(args.checkpoint, config.model.n_head, config.model.gelu)
        model = model.to(device)
    else:
        run = Run.open(config.out_dir)
        model, tokenizer = run.model(args.weights, str(device)), run.tokenizer
        prompt = prompt if prompt is not None else run.config.sample_prompt
    prompt = "ROMEO:" if prompt is None else prompt
    seed = config.seed if hasattr(args, "seed") else None
    knobs = (args.max_new_tokens, seed, args.num_samples, args.temperature, args.top_k, args.top_p)
    # one sample on a CPU is all reading of weights: bfloat16 would only add conversions (docs/performance.md), and
    # the first of several is to be the same one
    exact = config.dtype == "auto" and device.type == "cpu"
    with precision(choose_dtype("float32" if exact else config.dtype, device), device):
        tokens = continue_text(model, tokenizer, prompt, *knobs)
        if args.num_samples == 1:
            show(prompt, tokenizer, (token for (token,) in tokens))
            return 0
        made = list(zip(*tokens, strict=True)) or [()] * args.num_samples  # made together, shown one by one
    for number, sample in enumerate(made):
        if number:
            print(SEPARATOR)
        show(prompt, tokenizer, sample)
    return 0


def show(prompt: str, tokenizer: "Tokenizer", tokens: Iterable[int]) -> None:
    """Print a prompt and its continuation as it comes; a character is held back until all its bytes are there."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    print(prompt, end="", flush=True)
    for token in tokens:
        print(decoder.decode(tokenizer.decode_bytes([token])), end="", flush=True)
    print(decoder.decode(b"", final=True))


def bare_model(path: Path, n_head: int, gelu: str) -> "tuple[GPT, Tokenizer]":
    """A model and tokenizer from a .pt file; where no run stands around it, GPT-2's tokens are assumed, and said."""
    import torch

    from llm.run import Run
    from llm.tokens.bpe import gpt2
    from llm.tokens.token_files import GPT2_VOCAB
    from llm.weights import load_model

    base = from_settings({"n_head": n_head, "gelu": gelu, "n_embd": n_head}).model  # sizes come from the file
    model = load_model(path, torch.device("cpu"), base)
    if (path.parent / "config.toml").exists():
        return model, Run.open(path.parent).tokenizer
    if model.config.vocab_size < GPT2_VOCAB:
        raise UserError(
            f"{path}: has a vocabulary of {model.config.vocab_size}, which is not GPT-2's, and no run around it "
            f"that could say which; sample from its run folder with --out_dir"
        )
    warn(f"{path}: a bare state_dict, so GPT-2's tokens and {model.config.n_head} heads are assumed")
    return model, gpt2()


def read_prompt(source: str) -> str:
    """The text of a file, or of standard input for -. Raises UserError."""
    try:
        content = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise UserError(f"prompt_file {source}: cannot be read ({error.strerror})") from None
    return decode(content, f"prompt_file {source}", "" if source == "-" else source)
