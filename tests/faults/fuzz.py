"""Coverage-guided fuzzing of our parsers, with atheris: python -m tests.faults.fuzz PARSER -max_total_time=15

Whatever bytes a file holds, reading it ends in a value or in a UserError of one line that names the file.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris
import torch
from safetensors.torch import save

with atheris.instrument_imports(include=["llm", "json", "tomllib"]):
    from llm import config, storage
    from llm.errors import UserError
    from llm.record import metrics
    from llm.storage import checkpoint
    from llm.tokens import saved_tokenizer, tokenizer
    from llm.tokens.token_files import read_meta

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz"))


def settings(content: bytes) -> None:
    path = FOLDER / "settings.toml"
    path.write_bytes(content)
    config.from_settings(config.read_toml(str(path)))


def record(content: bytes) -> None:
    (FOLDER / metrics.NAME).write_bytes(content)
    metrics.read_record(FOLDER)


def tokens(content: bytes) -> None:
    path = FOLDER / "tokenizer.json"
    path.write_bytes(content)
    saved_tokenizer.load_tokenizer(path)


def description(content: bytes) -> None:
    (FOLDER / "meta.json").write_bytes(content)
    read_meta(FOLDER)


def manifest(content: bytes) -> None:
    folder = FOLDER / "step-000001"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_bytes(content)
    storage.verify_folder(folder)


def state(content: bytes) -> None:
    """A state that its manifest vouches for, so that it is parsed."""
    folder = FOLDER / "step-000002"
    folder.mkdir(exist_ok=True)
    files = {}
    for name, inside in (("state.json", b'{"step": 2}'), ("model.safetensors", content)):
        (folder / name).write_bytes(inside)
        files[name] = {"size": len(inside), "sha256": storage.sha256(folder / name)}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    checkpoint.load_state(folder)


PARSERS: dict[str, Callable[[bytes], None]] = {
    function.__name__: function for function in (settings, record, tokens, description, manifest, state)
}


ROW = {"step": 1, "split": "val", "loss": 1.5, "lr": 0.1}
SPLIT = {"size": 8, "mtime_ns": 1, "max_id": 3, "sha256": "00", "tokens": 4}
META = {"vocab_size": 4, "dtype": "uint16", "source": {"name": "x"}, "splits": {"train": SPLIT, "val": SPLIT}}
SEEDS = {  # one good file of each kind, to start from
    "settings": config.write_toml(config.TrainConfig()).encode(),
    "record": json.dumps(ROW).encode() + b"\n",
    "tokens": json.dumps(tokenizer.Characters("abc").to_json()).encode(),
    "description": json.dumps(META).encode(),
    "manifest": b'{"files": {"a": {"size": 1, "sha256": "00"}}}',
    "state": save({"a": torch.zeros(2)}),
}


def main() -> None:
    name = sys.argv[1]
    parse, corpus = PARSERS[name], FOLDER / "corpus"
    corpus.mkdir()
    (corpus / "seed").write_bytes(SEEDS[name])

    def once(content: bytes) -> None:
        try:
            parse(content)
        except UserError as error:
            names: Any = (str(FOLDER), " = ", "warmup_steps")  # a file, or a field and its value
            if "\n" in str(error) or not any(name in str(error) for name in names):
                raise AssertionError(f"not one line that names a file or a field: {error}") from error

    atheris.Setup([sys.argv[0], *sys.argv[2:], str(corpus)], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
