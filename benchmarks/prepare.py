"""Preparing a text: ours on all cores, whole (read, tokenized, hashed, written), and tiktoken alone on one core.

The text is tiny Shakespeare, shuffled line by line and repeated up to --megabytes; both sides run in turn, and their
ids are compared.

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

from llm.text.corpus import opened
from llm.tokens.cut import pieces
from llm.tokens.prepare import prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with opened(("shakespeare",), offline=True) as source:
        lines = "".join(source.files[0].read()).splitlines(keepends=True)
    draw, size = random.Random(0), 0
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        with text.open("w", encoding="utf-8") as file:
            while size < args.megabytes * 10**6:
                draw.shuffle(lines)
                size += file.write("".join(lines))
        ours, alone = [], []
        for number in range(args.rounds):
            start = time.perf_counter()
            prepare((str(text),), Path(folder, f"data{number}"), "gpt2", offline=True)
            ours.append(size / 1e6 / (time.perf_counter() - start))
            if number == 0:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            seconds, ids = one_core(text)
            alone.append(size / 1e6 / seconds)
        found = np.fromfile(Path(folder, "data0", "train.bin"), "<u2")[:-1]  # its last token may be cut short
        same = np.array_equal(found, ids[: len(found)])
    a, b = statistics.median(ours), statistics.median(alone)
    print(f"ours, all cores: {a:.1f} MB/s; tiktoken alone, one core: {b:.1f} MB/s; {a / b:.2f}x; peak {peak:.0f} MiB")
    print(f"the ids are {'the same' if same else 'NOT the same'}")


def one_core(text: Path) -> tuple[float, Any]:
    """Seconds that tiktoken takes for a text in pieces of about a megabyte, and the ids."""
    encode, seconds, ids = tiktoken.get_encoding("gpt2").encode_ordinary, 0.0, []
    for piece in pieces([text.read_text(encoding="utf-8")], 2**20):
        start = time.perf_counter()
        found = encode(piece)
        seconds += time.perf_counter() - start
        ids.append(np.array(found, dtype=np.uint16))
    return seconds, np.concatenate(ids)


if __name__ == "__main__":
    main()
