"""Make the reference bands that ship with the package: the validation losses of a preset's runs, over seeds.

Trains the runs that are not finished (each seed into OUT_DIR/PRESET-SEED, resumed if it was interrupted), then writes
llm/record/reference/PRESET.json. Finished runs made elsewhere can be given as folders. A run that is not finished
counts up to its last evaluation: the band ends where its shortest run does.

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
from llm.record.runs import summary
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
    band = make_band(args.preset, runs)
    (REFERENCE / f"{args.preset}.json").write_text(to_json(band), encoding="utf-8")
    print(f"{args.preset}: {len(band['val'])} runs, steps {band['steps'][0]} to {band['steps'][-1]}")


def train(preset: str, seed: str, data_dir: Path, out_dir: Path) -> None:
    """Train a run of the preset: resume it if it exists, and leave it as it is if it has ended."""
    if summary(out_dir).state in ("done", "stopped"):
        return
    if (out_dir / "config.toml").exists():
        flags = ["--resume"]
    else:
        flags = ["--preset", preset, "--seed", seed, "--data_dir", str(data_dir), "--sample_tokens", "0"]
    subprocess.run([sys.executable, "-m", "llm", "train", "--out_dir", str(out_dir), *flags], check=True)


def make_band(preset: str, runs: list[Path]) -> dict[str, Any]:
    """Return the content of the band's file. Raises ValueError if the runs differ in settings or data."""
    configs = [run_config(run) for run in runs]
    environments = [storage.read_json(run / "env.json") for run in runs]
    for config, environment in zip(configs, environments, strict=True):
        if shaping(config) != shaping(configs[0]) or environment["data"] != environments[0]["data"]:
            raise ValueError(f"{preset}: the runs differ in settings or data")
    curves = [dict(losses(read_record(run), "val")) for run in runs]
    steps = sorted(set.intersection(*map(set, curves)))
    val = {}
    for config, curve in zip(configs, curves, strict=True):
        val[str(config.seed)] = [round(curve[step], 5) for step in steps]
    return {
        "preset": preset,
        "made_with": {
            "torch": environments[0]["torch"],
            "machine": environments[0]["machine"],
            "dtype": configs[0].dtype,
        },
        "data": environments[0]["data"],
        "settings": shaping(configs[0]),
        "steps": steps,
        "val": val,
    }


def to_json(band: dict[str, Any]) -> str:
    """Return JSON with one line per item, so that a diff of it is readable."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in band.items() if key != "val"]
    seeds = [f"    {json.dumps(seed)}: {json.dumps(values)}" for seed, values in band["val"].items()]
    return "{\n" + ",\n".join(lines) + ',\n  "val": {\n' + ",\n".join(seeds) + "\n  }\n}\n"


if __name__ == "__main__":
    main()
