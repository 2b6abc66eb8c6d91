"""How many tokens a run has to train on: counted where they are there, else estimated."""

import contextlib
import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

from llm.config import TrainConfig
from llm.errors import Failure, UserError
from llm.text import corpus, hub
from llm.tokens.prepare import prepare
from llm.tokens.reuse import default_folder
from llm.tokens.token_files import GPT2_VOCAB, check_length, has_tokens, read_meta, vocabulary_of

BYTES_PER_TOKEN = {"gpt2": 3.3, "auto": 3.3, "bpe": 3.2, "byte": 1.0, "char": 1.0}  # of tiny Shakespeare


VOCABULARY = {"gpt2": GPT2_VOCAB, "auto": GPT2_VOCAB, "bpe": 4096, "byte": 257, "char": 65}


TEXT_BYTES = 1_115_394  # of tiny Shakespeare, the default text


FEW = 10  # windows of estimated tokens, below which a text is tokenized to see whether it is too short


@dataclass(frozen=True)
class Text:
    """What a run would be trained on."""

    tokens: int  # of the training split
    vocabulary: int
    unprepared: int = 0  # bytes still to be tokenized, so that the tokens are an estimate; 0: they were counted


def text_of(config: TrainConfig) -> Text:
    """The text of a run: counted where its token files are there, else estimated by the size of what they would be
    made from (a character tokenizer's exactly: it is read).

    Raises UserError for a text that is not there, is empty or cannot be read, and for a meta.json that is damaged.
    """
    folder, given = Path(config.data_dir or default_folder(config)), config.vocab_size
    if has_tokens(folder):
        meta = read_meta(folder)
        vocabulary = vocabulary_of(folder, meta, given)
        tokens = check_length(folder, "train", meta, config.model.block_size)
        check_length(folder, "val", meta, config.model.block_size)
        return Text(tokens, given or vocabulary)
    if config.data_dir and not config.text:
        raise UserError(f"data_dir = {config.data_dir}: no train.bin there; name a text with --text")
    words = config.text or (corpus.SHAKESPEARE,)
    named = (corpus.SHAKESPEARE, *hub.TEXTS)  # which need not be downloaded for this
    files = tuple(word for word in words if word not in named)
    taken = config.text_limit or hub.TEXT_LIMIT
    size = count = sum(taken if word in hub.TEXTS else TEXT_BYTES for word in words if word in named)
    vocabulary = VOCABULARY[config.tokenizer]
    if files:
        with corpus.opened(files, text_field=config.text_field) as source:
            size += sum(file.text_bytes() for file in source.files)
            if config.tokenizer == "char":
                survey = corpus.look(source, alphabet=True)
                count, vocabulary = count + survey.total, len(survey.alphabet)
    if config.tokenizer != "char":
        count = int(size / BYTES_PER_TOKEN[config.tokenizer])
    tokens = int(count * (1 - config.val_fraction))
    if tokens < FEW * config.model.block_size and all(Path(word).is_file() or Path(word).is_dir() for word in words):
        check_short(config)
    if tokens == 0:
        raise UserError("text: there is nothing in it to train on; give more")
    return Text(tokens, given or vocabulary, size)


def check_short(config: TrainConfig) -> None:
    """Raises UserError for a text that is too short to train on, as its preparation does: by trying it."""
    settings = (config.tokenizer, config.vocab_size, config.val_fraction)
    absent = contextlib.suppress(Failure)  # of GPT-2's vocabulary, which is not downloaded for this
    with tempfile.TemporaryDirectory(prefix="losscurve-") as folder, absent:
        prepare(
            config.text,
            Path(folder) / "data",
            *settings,
            offline=True,
            block_size=config.model.block_size,
            text_field=config.text_field,
        )


def with_vocabulary(config: TrainConfig, size: int) -> TrainConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
