"""`plan`: predict what a run takes on this machine, or propose a run that fits a given time. Nothing is trained.

A run on many accelerators: `plan_scale.py`. The lines that it prints: `plan_lines.py`.
"""

import argparse
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.commands.flags import Parser, add_settings, config_from, flag, given_settings, path, request_from, warn
from llm.commands.planning import plan_scale
from llm.config import FIELDS, PRESETS, GPTConfig, TrainConfig

if TYPE_CHECKING:
    from llm.plan.autopilot import Choice
    from llm.plan.request import Request
    from llm.plan.text_size import Text
    from llm.plan.timing import Pace


DESCRIPTION = (
    "Predict the memory, disk and time of a run on this machine; or, with --time, propose a run for that time."
)


@dataclass(frozen=True)
class PlannedRun:
    """A run that is planned, and what its plan follows from."""

    config: TrainConfig
    text: "Text"
    pace: "Pace | None"  # None: a step does not fit in the memory here
    teachers: Sequence[GPTConfig]  # the shapes of the models that it learns from
    choice: "Choice | None" = None  # for --time


def main(argv: list[str]) -> int:
    args = parse_flags(argv)
    if plan_scale.is_requested(args):
        return plan_scale.main(args)
    request = None if args.time is None else request_from(args)
    config = request.config if request else config_from(args)

    import json

    from llm.commands.bars import print_result
    from llm.plan.plan_file import check_new, write

    if args.out:
        check_new(args.out)
    lines: list[str] = []
    runs = plan_for_time(request, lines.append) if request else [plan_given(config, given_settings(args))]
    folders = [str(Path(run.config.out_dir)) for run in runs]  # those of teachers begin as that of the last run
    suffixes = [folder.removeprefix(folders[-1]) for folder in folders]
    files = [args.out.with_stem(args.out.stem + suffix) for suffix in suffixes] if args.out else []
    for file in files:
        check_new(file)
    facts = [predict(run) for run in runs]
    if args.json:
        print_result(json.dumps(facts[-1] | ({"teachers": facts[:-1]} if request else {})))
    else:
        for number, (run, numbers) in enumerate(zip(runs, facts, strict=True), 1):
            if len(runs) > 1:
                lines += ["", f"run {number} of {len(runs)}, in {run.config.out_dir}:"]
            lines += run_lines(run, numbers)
        print_result("\n".join(lines))
    for run, file in zip(runs, files, strict=False):
        write(run.config, file)
    if files and not args.json:
        commands = " && ".join(f"losscurve train {flag('preset', file)}" for file in files)
        these = "it" if len(files) == 1 else "them"
        print_result(f"wrote {', '.join(map(str, files))}; train {these} with: {commands}")
    return 0


def plan_for_time(request: "Request", announce: Callable[[str], None]) -> list[PlannedRun]:
    """Return the runs for --time, teachers before their run. `announce`: see `choose_all`. Raises UserError."""
    from llm.plan.autopilot import choose_all
    from llm.start.run_folder import once

    return [
        PlannedRun(choice.proposal.config, choice.proposal.text, choice.proposal.pace, choice.request.teachers, choice)
        for choice in choose_all(request, once(warn), announce)
    ]


def plan_given(config: TrainConfig, given: Collection[str]) -> PlannedRun:
    """Return the run of a config, whose pace is measured. `given`: the names of the settings that were given.

    Raises UserError.
    """
    from llm.plan.text_size import with_text
    from llm.plan.timing import busy_line, fits, probe
    from llm.start.sources import open_sources

    sources = open_sources(config, warn, given)
    config, text = with_text(sources, given)
    shapes = [teacher.config for teacher in sources.teachers]
    del sources  # their weights are not needed while this machine is measured
    pace = probe(config) if fits(config) else None
    if pace and (line := busy_line(pace)):
        warn(line)
    return PlannedRun(config, text, pace, shapes)


def run_lines(run: PlannedRun, facts: dict[str, Any]) -> Iterator[str]:
    """Yield the plan of a run in lines. `facts` are `predict`'s."""
    from llm.commands.planning.plan_lines import plan_lines
    from llm.plan.choice_lines import choice_lines

    if run.choice:
        yield from choice_lines(run.choice)
    yield from plan_lines(run.config, facts, run.text, run.choice.request.seconds if run.choice else None)


def parse_flags(argv: list[str]) -> argparse.Namespace:
    parser = Parser("losscurve plan", DESCRIPTION, bare=("text",))
    parser.add_argument("--preset", metavar="NAME|FILE.toml", help=f"settings to start from: {', '.join(PRESETS)}")
    add_settings(parser, FIELDS)
    parser.add_argument(
        "--time", metavar="TIME", help="choose a run for this time (90, 10m, 2h), around the given settings"
    )
    parser.add_argument("--out", metavar="FILE.toml", type=path, help="write the settings there, for train --preset")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan_scale.add_flags(parser)
    return parser.read(argv)


def predict(run: PlannedRun) -> dict[str, Any]:
    """Return the plan in numbers: parameters, bytes, FLOPs and seconds, by part. Unknown values are None."""
    from llm.config.counts import count_parameters_by_part, flops_per_token
    from llm.plan import arithmetic, timing

    config, pace = run.config, run.pace
    step_flops = flops_per_token(config.model) * config.tokens_per_step
    head_flops = 6 * config.model.vocab_size * config.model.n_embd * config.tokens_per_step
    memory = arithmetic.memory(config, run.teachers)
    if run.choice and "process" in memory:
        memory["process"] += run.choice.kept_bytes
    return {
        "parameters": count_parameters_by_part(config.model),
        "memory": memory,
        "machine_memory": arithmetic.machine_memory(),
        "disk": arithmetic.disk(config, run.text.tokens),
        "step_flops": step_flops,
        "head_flops": head_flops,  # of those of a step
        "run_flops": step_flops * config.max_steps,
        "flops_per_second": step_flops / pace.step if pace else None,
        "step_seconds": pace.step if pace else None,
        "seconds": timing.run_seconds(config, run.text, pace, run.teachers) if pace else None,
        "text_tokens": run.text.tokens,
    }
