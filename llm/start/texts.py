"""Open the token files and the tokenizer of a run."""

from pathlib import Path
from typing import Any

from llm.config import TrainConfig
from llm.data import TokenData, open_data
from llm.errors import Failure
from llm.machine.world import World
from llm.prepare.reuse import default_folder, ensure
from llm.start.run_folder import Say
from llm.tokens.bpe import gpt2
from llm.tokens.foreign import characters
from llm.tokens.saved_tokenizer import load_tokenizer
from llm.tokens.token_files import GPT2_VOCAB
from llm.tokens.tokenizer import Tokenizer, encode_prompt, first_readable


def open_text(
    config: TrainConfig, say: Say, progress: Any, given: Tokenizer | None, world: World
) -> tuple[TokenData, Tokenizer | None]:
    """Return the token files that a config asks for, and their tokenizer (None if it is unknown).

    If necessary, rank 0 prepares them first, with the tokenizer `given` or a new one. Then the first rank of each other
    machine does so, unless it sees the same folder.
    """
    folder = Path(config.data_dir or default_folder(config))
    for turn in (world.leads, world.local_rank == 0 and not world.leads):
        if turn:
            ensure(config, progress=progress, say=say, given=given)
        world.gather(None)
    data = open_data(folder, config.model.block_size, config.vocab_size)
    if not data.foreign:
        return data, load_tokenizer(folder / "tokenizer.json")
    if alphabet := characters(folder):
        say(f"{folder}: no meta.json; by its meta.pkl the ids are {data.vocab_size} characters")
        return data, alphabet
    say(f"{folder}: no meta.json, so its ids are taken for GPT-2's ({data.vocab_size} tokens)")
    if data.vocab_size != GPT2_VOCAB:
        return data, None
    try:
        return data, gpt2()
    except Failure as error:
        say(f"no samples and no bits per byte: {error}")
        return data, None


def run_tokenizer(out_dir: Path, vocab_size: int, say: Say, data_dir: Path | None = None) -> Tokenizer | None:
    """Return the tokenizer of a run, or that of its token files on a machine that does not see the run folder.

    Tokens of unknown origin are GPT-2's if there are as many, as in `open_text`; None if that is not available.
    """
    for path in (out_dir / "tokenizer.json", (data_dir or out_dir) / "tokenizer.json"):
        if path.exists():
            return load_tokenizer(path)
    if data_dir and (alphabet := characters(data_dir)):
        return alphabet
    try:
        return gpt2() if vocab_size == GPT2_VOCAB else None
    except Failure as error:
        say(f"no samples and no bits per byte: {error}")
        return None


def default_prompt(data: TokenData, tokenizer: Tokenizer | None) -> str:
    """Return "ROMEO:" for the chapter's text or an unknown one, else a line break, else the text's first token."""
    if tokenizer is None:
        return "ROMEO:"
    prompts = ("ROMEO:", "\n") if data.foreign or "shakespeare" in data.source else ("\n",)
    return first_readable(tokenizer, prompts) or tokenizer.decode(data.val[:1].tolist())


def check_prompt(tokenizer: Tokenizer | None, prompt: str | None) -> None:
    """Raise UserError if the prompt of a run's samples holds a character that its tokenizer cannot encode."""
    if tokenizer is not None and prompt:
        encode_prompt(tokenizer, prompt, "sample_prompt")
