"""`losscurve prepare`: a text in, token files out, and what they would be enough for."""

from collections.abc import Iterator
from typing import Any

from llm.commands.bars import tokenizing
from llm.commands.flags import Parser, add_settings, config_from, flag, warn

DESCRIPTION = (
    "Turn a text into token files: train.bin, val.bin, meta.json, tokenizer.json. The text: files (.jsonl and "
    ".parquet: a document a row), folders of .txt, .md and these (also as .gz and .zst), - for standard input, or a "
    "name: shakespeare, tinystories, fineweb-edu. Nothing: tiny Shakespeare, or a text that Python carries where that "
    "cannot be had."
)
TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022, "Chinchilla"


def main(argv: list[str]) -> int:
    parser = Parser("losscurve prepare", DESCRIPTION, bare=("text",))
    add_settings(parser, ["text", "text_limit", "text_field", "tokenizer", "vocab_size", "val_fraction"])
    parser.add_argument("--data_dir", default="data", metavar="DIR", help="folder to write to (default: data)")
    parser.add_argument("--offline", action="store_true", help="never touch the network")
    parser.add_argument("--overwrite", action="store_true", help="replace the token files that are there")
    parser.add_argument(
        "--shard_tokens", type=int, default=2**27, metavar="N", help="tokens in a file at most (default: 134217728)"
    )
    args = parser.read(argv)
    config = config_from(args)

    from pathlib import Path

    from llm.tokens.prepare import prepare

    folder = Path(config.data_dir or "data")
    with tokenizing() as progress:
        meta = prepare(
            config.text,
            folder,
            config.tokenizer,
            config.vocab_size,
            config.val_fraction,
            offline=args.offline,
            overwrite=args.overwrite,
            progress=progress,
            say=warn,
            text_limit=config.text_limit,
            text_field=config.text_field,
            shard_tokens=args.shard_tokens,
        )
    print("\n".join(summary(meta, folder)))
    return 0


def summary(meta: dict[str, Any], folder: object) -> Iterator[str]:
    """What was made, in lines."""
    train, val, source = meta["splits"]["train"], meta["splits"]["val"], meta["source"]
    tokens = train["tokens"] + val["tokens"]
    texts = "1 text" if source["documents"] == 1 else f"{source['documents']:,} texts"
    yield f"{source['name']}: {texts}, {source['characters']:,} characters, {source['bytes']:,} bytes"
    yield f"{meta['tokenizer']['kind']} tokens: train {train['tokens']:,}, val {val['tokens']:,}"
    yield f"{source['bytes'] / tokens:.2f} bytes per token; {meta['vocab_used']:,} of {meta['vocab_size']:,} ids in use"
    yield (
        f"at {TOKENS_PER_PARAMETER} tokens per parameter (Chinchilla, Hoffmann et al. 2022), "
        f"{train['tokens']:,} training tokens seen once fit {_short(train['tokens'] / TOKENS_PER_PARAMETER)} parameters"
    )
    yield f"wrote {folder}/{', '.join([_files(train), _files(val), 'meta.json', 'tokenizer.json'])}"
    yield "next: losscurve train" + ("" if str(folder) == "data" else f" {flag('data_dir', folder)}")


def _files(split: dict[str, Any]) -> str:
    shards = split.get("shards", [split])
    several = f" to {shards[-1]['file']}" if len(shards) > 1 else ""
    return f"{shards[0]['file']}{several}"


def _short(count: float) -> str:
    for size, unit in ((1e9, " billion"), (1e6, " million"), (1e3, " thousand")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"
