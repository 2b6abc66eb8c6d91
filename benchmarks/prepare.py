"""Compare the throughput of `prepare` on all cores with tiktoken alone on one core.

`prepare` reads, tokenizes, hashes and writes. The text is tiny Shakespeare, shuffled line by line and repeated up to
--megabytes. Both run in turn, and their token ids are compared.

    TIKTOKEN_CACHE_DIR=… python -m benchmarks.prepare [--megabytes 200] [--rounds 3]
"""

import argparse
import random
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from llm.prepare.prepare import prepare
from llm.text.corpus import opened
from llm.tokens.cut import pieces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        size = write_text(text, args.megabytes)
        ours = []
        alone = []
        for number in range(args.rounds):
            start = time.perf_counter()
            prepare((str(text),), Path(folder, f"data{number}"), "gpt2", offline=True)
            ours.append(size / 1e6 / (time.perf_counter() - start))
            if number == 0:  # before tiktoken runs in this process
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            seconds, ids = tokenize_on_one_core(text)
            alone.append(size / 1e6 / seconds)
        found = np.fromfile(Path(folder, "data0", "train.bin"), "<u2")
    found = found[:-1]  # the split may have cut its last token
    is_same = np.array_equal(found, ids[: len(found)])
    a = statistics.median(ours)
    b = statistics.median(alone)
    print(f"ours, all cores: {a:.1f} MB/s; tiktoken alone, one core: {b:.1f} MB/s; {a / b:.2f}x; peak {peak:.0f} MiB")
    print(f"the ids are {'the same' if is_same else 'NOT the same'}")


def write_text(path: Path, megabytes: int) -> int:
    """Write tiny Shakespeare again and again, each time with shuffled lines; return the size in characters."""
    with opened(("shakespeare",), offline=True) as source:
        lines = "".join(source.files[0].read()).splitlines(keepends=True)
    generator = random.Random(0)
    size = 0
    with path.open("w", encoding="utf-8") as file:
        while size < megabytes * 10**6:
            generator.shuffle(lines)
            size += file.write("".join(lines))
    return size


def tokenize_on_one_core(text: Path) -> tuple[float, Any]:
    """Tokenize a text with tiktoken in pieces of about a megabyte; return the seconds and the ids."""
    encode = tiktoken.get_encoding("gpt2").encode_ordinary
    seconds = 0.0
    ids = []
    for piece in pieces([text.read_text(encoding="utf-8")], 2**20):
        start = time.perf_counter()
        found = encode(piece)
        seconds += time.perf_counter() - start
        ids.append(np.array(found, dtype=np.uint16))
    return seconds, np.concatenate(ids)


if __name__ == "__main__":
    main()
