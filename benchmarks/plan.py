"""Compare what `losscurve plan` predicts with what a real run takes: peak memory and wall time.

Each run is a process of its own; its peak is the resident memory that the system reports when it ends. The plan is made
just before, in another process. TUNED runs were used to set the constants of llm/plan; HELD_OUT runs were not. Nothing
else may run on the machine meanwhile.

    python -m benchmarks.plan [--which held_out|tuned] [--rounds 2] [--json FILE]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

TUNED = {
    "chapter, 40 steps": "--max_steps 40 --eval_every 20",
    "bytes, 6 x 192, 60 steps": "--text shakespeare --tokenizer byte --n_layer 6 --n_embd 192 --n_head 6 "
    "--block_size 128 --batch_size 16 --max_steps 60 --eval_every 30 --eval_tokens 20000",
    "bytes, 2 x 64, 1500 steps": "--text shakespeare --tokenizer byte --n_layer 2 --n_embd 64 --n_head 2 "
    "--max_steps 1500 --eval_every 300",
}
HELD_OUT = {
    "shakespeare-char-cpu, whole": "--preset shakespeare-char-cpu",
    "characters, 4 x 256, 200 steps": "--text shakespeare --tokenizer char --n_layer 4 --n_embd 256 --n_head 4 "
    "--block_size 64 --batch_size 24 --max_steps 200 --eval_every 50 --eval_tokens 20000",
    "gpt2 tokens, tied 2 x 192, 100 steps": "--text shakespeare --tokenizer gpt2 --n_layer 2 --n_embd 192 --n_head 6 "
    "--tied_lm_head --batch_size 16 --max_steps 100 --eval_every 25",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--which", choices=("held_out", "tuned"), default="held_out")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    configurations = {"held_out": HELD_OUT, "tuned": TUNED}[args.which]
    rows = []
    print(f"{'run':<38}{'MiB: plan':>10}{'run':>7}{'error':>7}{'s: plan':>10}{'run':>7}{'error':>7}", flush=True)
    for name, flags in configurations.items():
        for _ in range(args.rounds):
            row = compare(name, flags.split())
            rows.append(row)
            memory = f"{row['mib_predicted']:>10.0f}{row['mib']:>7.0f}{row['mib_error']:>+7.0%}"
            seconds = f"{row['s_predicted']:>10.1f}{row['s']:>7.1f}{row['s_error']:>+7.0%}"
            print(f"{name:<38}{memory}{seconds}", flush=True)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


def compare(name: str, flags: list[str]) -> dict[str, Any]:
    """Plan a run, run it, and return both in MiB and seconds, with errors (predicted - taken) / taken."""
    llm = [sys.executable, "-m", "llm"]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"cwd": folder, "env": os.environ | {"PYTHONPATH": root}}
        planned = subprocess.run([*llm, "plan", *flags, "--json"], stdout=subprocess.PIPE, check=True, **options)
        plan = json.loads(planned.stdout)
        start = time.perf_counter()
        run = subprocess.Popen([*llm, "train", *flags, "--out_dir", "run"], stdout=subprocess.DEVNULL, **options)
        _, status, usage = os.wait4(run.pid, 0)  # unlike wait, it reports this one process's peak memory
        run.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
    if run.returncode:
        raise SystemExit(f"{name}: train ended with exit code {run.returncode}")
    mib = usage.ru_maxrss / 1024
    planned_mib = sum(plan["memory"].values()) / 2**20
    planned_seconds = sum(plan["seconds"].values())
    return {
        "run": name,
        "mib_predicted": planned_mib,
        "mib": mib,
        "mib_error": planned_mib / mib - 1,
        "s_predicted": planned_seconds,
        "s": seconds,
        "s_error": planned_seconds / seconds - 1,
        "plan": plan,
    }


if __name__ == "__main__":
    main()
