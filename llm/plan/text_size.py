"""The number of tokens that a run has to train on: counted if they are prepared, otherwise estimated."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from llm.config import TrainConfig
from llm.errors import Failure, UserError
from llm.prepare.prepare import prepare
from llm.prepare.reuse import default_folder
from llm.start import fine_tuning
from llm.start.sources import Sources
from llm.text import corpus, hub
from llm.tokens.bpe import train_bpe
from llm.tokens.token_files import GPT2_VOCAB, check_length, has_tokens, read_meta, vocabulary_of
from llm.tokens.tokenizer import Tokenizer

SAMPLE = 2**24  # characters that are read of a large text
BPE_SAMPLE = 2**19  # of these, characters that are tokenized, or that a BPE is trained on, to estimate the tokens
BPE_CHUNKS = 16  # that these are in, evenly spread

# of tiny Shakespeare; hf: as for GPT-2's; for hf and bpe, of a text that is not here yet (bpe: by its vocabulary)
BYTES_PER_TOKEN = {"gpt2": 3.3, "auto": 3.3, "hf": 3.3, "byte": 1.0, "char": 1.0}
BYTES_PER_BPE_TOKEN = ((0, 1.9), (1024, 2.4), (2048, 2.9), (4096, 3.2))

VOCABULARY = {"gpt2": GPT2_VOCAB, "auto": GPT2_VOCAB, "bpe": 4096, "byte": 257, "char": 65}

TEXT_BYTES = 1_115_394  # of tiny Shakespeare, the default text

# A text with an estimate of fewer windows than this is tokenized, to find out whether it is too short.
FEW_WINDOWS = 10


@dataclass(frozen=True)
class Text:
    """The text of a run."""

    tokens: int  # of the training split
    vocabulary: int
    unprepared: int = 0  # bytes still to be tokenized, so that `tokens` is an estimate; 0: the tokens were counted
    trains_bpe: bool = False  # whether a BPE is trained before
    preparation: float = 0.0  # seconds that its preparation has taken after the start of a given time
    uncounted: float = 0.0  # seconds of its preparation, taken or estimated, that are added to a given time


def with_text(sources: Sources, given: Collection[str]) -> tuple[TrainConfig, Text]:
    """Return the config with what follows from its text, the vocabulary or the steps to fine-tune, and the text.

    `given` are the names of the settings that the user gave. Raises UserError if the text cannot be trained on.
    """
    config = sources.config
    text = text_of(config, sources.tokenizer)
    if sources.start is None:
        config = with_vocabulary(config, text.vocabulary)
    elif sources.start.is_pretrained:
        config = fine_tuning.with_steps(config, text.tokens, given)
    return config, text


def text_of(config: TrainConfig, given: Tokenizer | None = None) -> Text:
    """Return the text of a run. `given`: the tokenizer of the weights that it starts from.

    Its tokens are counted if its token files exist, otherwise estimated from the size of the text and the tokens of a
    sample of it: those of the given tokenizer, or of a BPE that is trained on the sample. With a character tokenizer
    the text is read, so that the count is exact.

    Raises UserError for a text that does not exist, is empty, too short or cannot be read, and for a damaged meta.json.
    """
    folder = Path(config.data_dir or default_folder(config))
    if has_tokens(folder):
        return _count(config, folder)
    if config.data_dir and not config.text:
        raise UserError(f"data_dir = {config.data_dir}: no train.bin there; name a text with --text")
    return _estimate(config, given)


def _count(config: TrainConfig, folder: Path) -> Text:
    """Return the text of the token files in `folder`."""
    meta = read_meta(folder)
    vocabulary = vocabulary_of(folder, meta, config.vocab_size)
    tokens = check_length(folder, "train", meta, config.model.block_size)
    check_length(folder, "val", meta, config.model.block_size)
    return Text(tokens, config.vocab_size or vocabulary)


def _estimate(config: TrainConfig, given: Tokenizer | None) -> Text:
    """Return the text that token files would be made from."""
    names = config.text or (corpus.SHAKESPEARE,)
    downloads = (corpus.SHAKESPEARE, *hub.TEXTS)  # their sizes are known, so nothing is downloaded here
    files = tuple(name for name in names if name not in downloads)
    size = 0  # bytes
    for name in names:
        if name in hub.TEXTS:
            size += config.text_limit or hub.TEXT_LIMIT
        elif name in downloads:
            size += TEXT_BYTES
    characters = size
    vocabulary = VOCABULARY.get(config.tokenizer, config.model.vocab_size)  # of hf: that of the weights
    bytes_per_token = _bytes_per_token(config, vocabulary)
    if files:
        with corpus.opened(files, text_field=config.text_field) as source:
            size += sum(file.text_bytes() for file in source.files)
            if config.tokenizer in ("bpe", "hf"):
                bytes_per_token = sampled_bytes_per_token(
                    "".join(beginning(source)), config.vocab_size or vocabulary, given
                )
            if config.tokenizer == "char":
                survey = corpus.look(source, alphabet=True)
                characters += survey.total
                vocabulary = len(survey.alphabet)
    count = characters if config.tokenizer == "char" else int(size / bytes_per_token)
    tokens = int(count * (1 - config.val_fraction))
    are_paths = all(Path(name).is_file() or Path(name).is_dir() for name in names)
    if tokens < FEW_WINDOWS * config.model.block_size and are_paths:
        check_short(config, given)
    if tokens == 0:
        raise UserError("text: there is nothing in it to train on; give more")
    return Text(tokens, config.vocab_size or vocabulary, size, config.tokenizer == "bpe" and given is None)


def _bytes_per_token(config: TrainConfig, vocabulary: int) -> float:
    if config.tokenizer != "bpe":
        return BYTES_PER_TOKEN[config.tokenizer]
    return [size for least, size in BYTES_PER_BPE_TOKEN if least <= (config.vocab_size or vocabulary)][-1]


def beginning(source: corpus.Corpus) -> list[str]:
    """Return the first SAMPLE characters of a text in pieces, up to the end of the last piece."""
    pieces: list[str] = []
    characters = 0
    for piece in (piece for file in source.files for piece in file.read()):
        pieces.append(piece)
        characters += len(piece)
        if characters >= SAMPLE:
            break
    return pieces


def sampled_bytes_per_token(text: str, vocab_size: int, given: Tokenizer | None = None) -> float:
    """Return the bytes of a token of `given`, or of a BPE that is trained for it, in a sample of `text`.

    The sample has fewer distinct words than the whole text, so a token of a BPE trained on it is a few percent too
    long. Raises UserError for `vocab_size`, and for a text that `given` cannot encode.
    """
    size = BPE_SAMPLE // BPE_CHUNKS
    chunks = [text]
    if len(text) > BPE_SAMPLE:
        starts = [number * (len(text) - size) // (BPE_CHUNKS - 1) for number in range(BPE_CHUNKS)]
        chunks = [text[start : start + size] for start in starts]
    tokenizer = given or train_bpe(chunks, vocab_size)
    tokens = sum(len(tokenizer.encode(chunk)) for chunk in chunks)
    return sum(len(chunk.encode("utf-8")) for chunk in chunks) / tokens if tokens else 1.0


def check_short(config: TrainConfig, given: Tokenizer | None) -> None:
    """Raises UserError for a text that is too short to train on, in the words of `prepare`, which tries it here."""
    # Failure: GPT-2's vocabulary is not on this machine, and it is not downloaded for this check
    with tempfile.TemporaryDirectory(prefix="losscurve-") as folder, contextlib.suppress(Failure):
        prepare(
            config.text,
            Path(folder) / "data",
            config.tokenizer,
            config.vocab_size,
            config.val_fraction,
            offline=True,
            block_size=config.model.block_size,
            given=given,
            text_field=config.text_field,
        )


def with_vocabulary(config: TrainConfig, size: int) -> TrainConfig:
    """Return `config` with a vocabulary of `size` tokens in its model."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
