"""What the live page's server costs while a run is followed: its own CPU seconds, without a browser.

A process of its own serves a run folder that grows: a training row every second (a run of this machine's speed logs
about as many; `--rows_per_second` sets others), an evaluation with a sample every ten. Viewers read the stream of
events and do nothing with it. The record begins with `--before` rows. Linux only: CPU time comes from /proc.

    python -m benchmarks.page [--viewers 0,1,4] [--seconds 60] [--before 5000] [--rows_per_second 1]
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--viewers", default="0,1,4")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--before", type=int, default=5000)
    parser.add_argument("--rows_per_second", type=int, default=1)
    args = parser.parse_args()
    print(f"{'viewers':>8}{'CPU seconds':>14}{'of one core':>14}{'resident':>12}{'first look':>13}")
    for viewers in map(int, args.viewers.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            run = Run(Path(folder), args.before)
            spent, memory, first = measured(run, viewers, args.seconds, args.rows_per_second)
        share = f"{spent / args.seconds:.2%}"
        print(f"{viewers:>8}{spent:>12.2f} s{share:>14}{memory / 2**20:>8.0f} MiB{first:>11.2f} s", flush=True)


class Run:
    """A run folder as a training run writes it."""

    def __init__(self, folder: Path, before: int) -> None:
        self.folder, self.step, self.samples = folder, 0, ""
        (folder / "config.toml").write_text("vocab_size = 50257\nmax_steps = 1000000\n")
        with (folder / "metrics.jsonl").open("w") as file:
            for _ in range(before):
                file.write(self.row("train"))
                if self.step % (before // 100 or 1) == 0:
                    file.write(self.evaluation())
        (folder / "samples.txt").write_text(self.samples)

    def row(self, split: str, **more: float) -> str:
        self.step += split == "train"
        loss, noise = 3 + 8 / (1 + self.step / 500), 0.1 * ((self.step * 2654435761 >> 16) % 1000) / 1000
        facts = {"step": self.step, "split": split, "loss": loss + noise, "lr": 3e-4, "grad_norm": 1 + noise}
        facts |= {"tokens": self.step * 2048, "seconds": self.step * 0.4, "tokens_per_second": 5000 + 100 * noise}
        return json.dumps(facts | {"matmul_utilisation": 0.54} | more) + "\n"

    def evaluation(self) -> str:
        text = self.row("val", loss=round(3 + 8 / (1 + self.step / 500), 4), bits_per_byte=2.2)
        loss = json.loads(text)["loss"]
        self.samples += f"--- step {self.step} | val {loss:.4f} ---\n{'What light through yonder ' * 12}\n\n"
        return text

    def grow(self, seconds: int, rows_per_second: int) -> None:
        for second in range(1, seconds + 1):
            time.sleep(1)
            text = "".join(self.row("train") for _ in range(rows_per_second))
            if second % 10 == 0:
                text += self.evaluation()
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(text)
            if second % 10 == 0:
                (self.folder / "new").write_text(self.samples)
                (self.folder / "new").replace(self.folder / "samples.txt")


def measured(run: Run, viewers: int, seconds: int, rows_per_second: int) -> tuple[float, float, float]:
    """CPU seconds while the run grows, resident bytes at the end, seconds until the first viewer had all there was."""
    command = [sys.executable, "-m", "llm", "watch", str(run.folder)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout
    try:
        address = re.findall(r"http://\S+", server.stdout.readline())[0]
        began, first = time.perf_counter(), [0.0]
        ready = threading.Semaphore(0)

        def view() -> None:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with contextlib.suppress(OSError), opener.open(address + "events") as stream:
                for line in stream:
                    if b'"read": 1}' in line:
                        first[0] = first[0] or time.perf_counter() - began
                        ready.release()

        for _ in range(viewers):
            threading.Thread(target=view, daemon=True).start()
        for _ in range(viewers):
            ready.acquire()
        time.sleep(1 + (viewers == 0))  # what starting costs is not counted
        before = cpu_seconds(server.pid)
        run.grow(seconds, rows_per_second)
        spent = cpu_seconds(server.pid) - before
        pages = int(Path(f"/proc/{server.pid}/statm").read_text().split()[1])
        return spent, pages * os.sysconf("SC_PAGE_SIZE"), first[0]
    finally:
        server.terminate()
        server.wait()


def cpu_seconds(pid: int) -> float:
    """Of all threads of a process, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
