"""Measure what the live page's server costs while it follows a run: its CPU seconds, without a browser.

A separate process serves a run folder that grows: a training row every second (a run of this machine's speed logs about
as many; `--rows_per_second` changes it), an evaluation with a sample every ten. Viewers read the stream of events and
drop it. The record begins with `--before` rows. Linux only: CPU time comes from /proc.

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

from llm.record.samples import Samples


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
            run = GrowingRun(Path(folder), args.before)
            cpu, resident, first_view = measure(run, viewers, args.seconds, args.rows_per_second)
        share = f"{cpu / args.seconds:.2%}"
        print(f"{viewers:>8}{cpu:>12.2f} s{share:>14}{resident / 2**20:>8.0f} MiB{first_view:>11.2f} s", flush=True)


class GrowingRun:
    """A run folder that is written as a training run writes it."""

    def __init__(self, folder: Path, before: int) -> None:
        self.folder = folder
        self.step = 0
        self.samples = Samples(folder)
        (folder / "config.toml").write_text("vocab_size = 50257\nmax_steps = 1000000\n")
        with (folder / "metrics.jsonl").open("w") as file:
            for _ in range(before):
                file.write(self.train_row())
                if self.step % (before // 100 or 1) == 0:
                    file.write(self.evaluation_row())
        self.samples.catch_up()

    def train_row(self) -> str:
        """Return the row of the next step."""
        self.step += 1
        return self._row("train")

    def evaluation_row(self) -> str:
        """Return the row of an evaluation at this step, and add its sample."""
        loss = round(3 + 8 / (1 + self.step / 500), 4)
        self.samples.add(step=self.step, val_loss=loss, prompt="\n", text="What light through yonder " * 12)
        return self._row("val", loss=loss, bits_per_byte=2.2)

    def _row(self, split: str, **more: float) -> str:
        loss = 3 + 8 / (1 + self.step / 500)
        noise = 0.1 * ((self.step * 2654435761 >> 16) % 1000) / 1000
        facts = {
            "step": self.step,
            "split": split,
            "loss": loss + noise,
            "lr": 3e-4,
            "grad_norm": 1 + noise,
            "tokens": self.step * 2048,
            "seconds": self.step * 0.4,
            "tokens_per_second": 5000 + 100 * noise,
            "matmul_utilisation": 0.54,
        }
        return json.dumps(facts | more) + "\n"

    def grow(self, seconds: int, rows_per_second: int) -> None:
        """Write rows for so many seconds."""
        for second in range(1, seconds + 1):
            time.sleep(1)
            rows = [self.train_row() for _ in range(rows_per_second)]
            if second % 10 == 0:
                rows.append(self.evaluation_row())
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write("".join(rows))
            if second % 10 == 0:
                self.samples.catch_up()


def measure(run: GrowingRun, viewers: int, seconds: int, rows_per_second: int) -> tuple[float, float, float]:
    """Serve the run while it grows.

    Returns (CPU seconds of the server, its resident bytes at the end, seconds until the first viewer had everything).
    """
    command = [sys.executable, "-m", "llm", "watch", str(run.folder)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout
    try:
        address = re.findall(r"http://\S+", server.stdout.readline())[0]
        began = time.perf_counter()
        complete: list[float] = []  # seconds until a viewer had everything
        ready = threading.Semaphore(0)

        def view() -> None:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with contextlib.suppress(OSError), opener.open(address + "events") as stream:
                for line in stream:
                    if b'"read": 1}' in line:
                        complete.append(time.perf_counter() - began)
                        ready.release()

        for _ in range(viewers):
            threading.Thread(target=view, daemon=True).start()
        for _ in range(viewers):
            ready.acquire()
        time.sleep(1 if viewers else 2)  # starting is not measured
        before = cpu_seconds(server.pid)
        run.grow(seconds, rows_per_second)
        spent = cpu_seconds(server.pid) - before
        pages = int(Path(f"/proc/{server.pid}/statm").read_text().split()[1])
        first_view = complete[0] if complete else 0.0
        return spent, pages * os.sysconf("SC_PAGE_SIZE"), first_view
    finally:
        server.terminate()
        server.wait()


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of all threads of a process, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system = fields[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
