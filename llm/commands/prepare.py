"""`losscurve prepare`: turn a text into token files, and print what model size they suit."""

from collections.abc import Iterator
from typing import Any

from llm.commands.bars import progress_bar
from llm.commands.flags import Parser, add_settings, config_from, flag, note

DESCRIPTION = (
    "Turn a text into token files: train.bin, val.bin, meta.json, tokenizer.json. The text: files (.jsonl and "
    ".parquet: one document per row), folders of .txt, .md and these (also as .gz and .zst), - for standard input, or "
    "a name: shakespeare, tinystories, fineweb-edu. Without a text: tiny Shakespeare, or, if that is not available, "
    "a text that comes with Python."
)
TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022, "Chinchilla"


def main(argv: list[str]) -> int:
    parser = Parser("losscurve prepare", DESCRIPTION, bare=("text",))
    add_settings(parser, ["text", "text_limit", "text_field", "tokenizer", "vocab_size", "val_fraction"])
    parser.add_argument("--data_dir", default="data", metavar="DIR", help="folder to write to (default: data)")
    parser.add_argument("--offline", action="store_true", help="never use the network")
    parser.add_argument("--overwrite", action="store_true", help="replace existing token files")
    parser.add_argument(
        "--shard_tokens", type=int, default=2**27, metavar="N", help="maximum tokens per file (default: 134217728)"
    )
    args = parser.read(argv)
    config = config_from(args)

    from pathlib import Path

    from llm.prepare.prepare import prepare

    folder = Path(config.data_dir or "data")
    with progress_bar("tokenizing") as progress:
        meta = prepare(
            config.text,
            folder,
            config.tokenizer,
            config.vocab_size,
            config.val_fraction,
            offline=args.offline,
            overwrite=args.overwrite,
            progress=progress,
            say=note,
            text_limit=config.text_limit,
            text_field=config.text_field,
            shard_tokens=args.shard_tokens,
        )
    print("\n".join(summary(meta, folder)))
    return 0


def summary(meta: dict[str, Any], folder: object) -> Iterator[str]:
    """Yield lines that describe the token files of `meta`, the content of meta.json."""
    train = meta["splits"]["train"]
    val = meta["splits"]["val"]
    source = meta["source"]
    tokens = train["tokens"] + val["tokens"]
    texts = "1 text" if source["documents"] == 1 else f"{source['documents']:,} texts"
    yield f"{source['name']}: {texts}, {source['characters']:,} characters, {source['bytes']:,} bytes"
    yield f"{meta['tokenizer']['kind']} tokens: train {train['tokens']:,}, val {val['tokens']:,}"
    yield f"{source['bytes'] / tokens:.2f} bytes per token; {meta['vocab_used']:,} of {meta['vocab_size']:,} ids in use"
    yield (
        f"at {TOKENS_PER_PARAMETER} tokens per parameter (Chinchilla, Hoffmann et al. 2022), {train['tokens']:,} "
        f"training tokens seen once fit {_format_count(train['tokens'] / TOKENS_PER_PARAMETER)} parameters"
    )
    yield f"wrote {folder}/{', '.join([_file_names(train), _file_names(val), 'meta.json', 'tokenizer.json'])}"
    yield "next: losscurve train" + ("" if str(folder) == "data" else f" {flag('data_dir', folder)}")


def _file_names(split: dict[str, Any]) -> str:
    files = [shard["file"] for shard in split.get("shards", [split])]
    return files[0] if len(files) == 1 else f"{files[0]} to {files[-1]}"


def _format_count(count: float) -> str:
    for size, unit in ((1e9, " billion"), (1e6, " million"), (1e3, " thousand")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"
