"""Make the reference bands that ship with the package: the validation losses of a preset's runs, over seeds.

Trains what is not there yet (each seed into OUT_DIR/PRESET-SEED, resumed if it was stopped), then writes
llm/record/reference/PRESET.json. Finished runs made elsewhere can be given as folders. A run that is not finished
counts up to where it is: the band ends where the shortest of its runs does.

    python -m benchmarks.bands chapter --seeds 1337,1,2 --data_dir data --out_dir runs/bands [RUN ...]
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from llm import storage
from llm.record.bands import shaping
from llm.record.metrics import losses, read_record
from llm.weights import run_config

REFERENCE = Path(__file__).parent.parent / "llm" / "record" / "reference"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("--seeds", default="")
    parser.add_argument("--data_dir", type=Path, help="token files, for runs that are trained here")
    parser.add_argument("--out_dir", type=Path, default=Path("runs/bands"))
    args = parser.parse_args()
    runs = list(args.runs)
    for seed in filter(None, args.seeds.split(",")):
        out_dir = args.out_dir / f"{args.preset}-{seed}"
        train(args.preset, seed, args.data_dir, out_dir)
        runs.append(out_dir)
    facts = collected(args.preset, runs)
    REFERENCE.mkdir(exist_ok=True)
    (REFERENCE / f"{args.preset}.json").write_text(spelled(facts), encoding="utf-8")
    print(f"{args.preset}: {len(facts['val'])} runs, steps {facts['steps'][0]} to {facts['steps'][-1]}")


def train(preset: str, seed: str, data_dir: Path, out_dir: Path) -> None:
    begin = ["--preset", preset, "--seed", seed, "--data_dir", str(data_dir), "--sample_tokens", "0"]
    words = ["--resume"] if (out_dir / "config.toml").exists() else begin
    subprocess.run([sys.executable, "-m", "llm", "train", "--out_dir", str(out_dir), *words], check=True)


def collected(preset: str, runs: list[Path]) -> dict[str, Any]:
    """The band's file. Raises ValueError where the runs are not of the same settings, data and machine."""
    configs = [run_config(run) for run in runs]
    envs = [storage.read_json(run / "env.json") for run in runs]
    for config, env in zip(configs, envs, strict=True):
        if shaping(config) != shaping(configs[0]) or env["data"] != envs[0]["data"]:
            raise ValueError(f"{preset}: the runs differ in settings or data")
    curves = [dict(losses(read_record(run), "val")) for run in runs]
    steps = sorted(set.intersection(*map(set, curves)))
    return {
        "preset": preset,
        "made_with": {key: envs[0][key] for key in ("torch", "machine")} | {"dtype": configs[0].dtype},
        "data": envs[0]["data"],
        "settings": shaping(configs[0]),
        "steps": steps,
        "val": {
            str(config.seed): [round(curve[step], 5) for step in steps]
            for config, curve in zip(configs, curves, strict=True)
        },
    }


def spelled(facts: dict[str, Any]) -> str:
    """JSON with one line for each item, so that a change of it can be read."""
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in facts.items() if key != "val")
    seeds = ",\n".join(f"    {json.dumps(seed)}: {json.dumps(values)}" for seed, values in facts["val"].items())
    return "{\n" + ",\n".join(lines) + ',\n  "val": {\n' + seeds + "\n  }\n}\n"


if __name__ == "__main__":
    main()
