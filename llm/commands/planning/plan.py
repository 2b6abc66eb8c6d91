"""`plan`: predict what a run takes on this machine, or propose a run that fits a given time. Nothing is trained.

A run on many accelerators: `plan_scale.py`. The lines that it prints: `plan_lines.py`.
"""

import argparse
from typing import TYPE_CHECKING, Any

from llm.commands.flags import Parser, add_settings, config_from, flag, given_settings, path, request_from, warn
from llm.commands.planning import plan_scale
from llm.config import FIELDS, PRESETS, GPTConfig, TrainConfig

if TYPE_CHECKING:
    from llm.plan.text_size import Text
    from llm.plan.timing import Pace


DESCRIPTION = (
    "Predict the memory, disk and time of a run on this machine; or, with --time, propose a run for that time."
)


TEACHER = (
    "losscurve train --time trains a teacher first, in a third of this time, and then a run that learns from it, too; "
    "what follows is one run without"
)


def main(argv: list[str]) -> int:
    args = parse_flags(argv)
    if plan_scale.is_requested(args):
        return plan_scale.main(args)
    request = None if args.time is None else request_from(args)
    config = request.config if request else config_from(args)

    import json

    from llm.commands.bars import print_result
    from llm.commands.planning.plan_lines import plan_lines
    from llm.plan.autopilot import choose_run
    from llm.plan.choice_lines import choice_lines
    from llm.plan.plan_file import check_new, write
    from llm.plan.text_size import text_of, with_vocabulary
    from llm.plan.timing import busy_line, fits, probe
    from llm.start.fine_tuning import with_steps
    from llm.start.init_from import starting_point
    from llm.start.teacher import open_teacher, with_tokens

    if args.out:
        check_new(args.out)
    lines: list[str] = []
    pace: Pace | None
    teacher = open_teacher(config) if config.teacher else None
    if request:
        choice = choose_run(request, prepares=False, say=warn)
        config, text, pace = choice.proposal.config, choice.proposal.text, choice.proposal.pace
        lines += choice_lines(choice)
        if choice.calls_for_teacher:
            lines.append(f"teacher    {TEACHER}")
    else:
        if config.init_from:
            start = starting_point(config, warn, given_settings(args))
            text = text_of(start.config, start.tokenizer)
            config = start.config
            if start.is_pretrained:
                config = with_steps(config, text.tokens, given_settings(args))
        else:
            if teacher:
                config = with_tokens(config, teacher, warn)
            text = text_of(config, teacher.tokenizer if teacher else None)
            config = with_vocabulary(config, text.vocabulary)
        pace = probe(config) if fits(config) else None
        if pace and (line := busy_line(pace)):
            warn(line)
    facts = predict(config, text, pace, teacher.config if teacher else None)
    if request and "process" in facts["memory"]:
        facts["memory"]["process"] += choice.kept_bytes
    lines += plan_lines(config, facts, text, request.seconds if request else None)
    print_result(json.dumps(facts) if args.json else "\n".join(lines))
    if args.out:
        write(config, args.out)
        if not args.json:
            print_result(f"wrote {args.out}; train it with: losscurve train {flag('preset', args.out)}")
    return 0


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


def predict(config: TrainConfig, text: "Text", pace: "Pace | None", teacher: GPTConfig | None = None) -> dict[str, Any]:
    """Return the plan in numbers: parameters, bytes, FLOPs and seconds, by part. Unknown values are None."""
    from llm.config.counts import (
        count_parameters,
        count_parameters_by_part,
        flops_per_token,
        forward_flops_per_token,
    )
    from llm.plan import arithmetic, timing

    step_flops = flops_per_token(config.model) * config.tokens_per_step
    memory, disk = arithmetic.memory(config), arithmetic.disk(config, text.tokens)
    if teacher:
        memory["teacher"] = arithmetic.teacher_bytes(config, teacher)
        disk["copy of the teacher"] = 4 * count_parameters(teacher)
        step_flops += forward_flops_per_token(teacher) * config.tokens_per_step
    return {
        "parameters": count_parameters_by_part(config.model),
        "memory": memory,
        "machine_memory": arithmetic.machine_memory(),
        "disk": disk,
        "step_flops": step_flops,
        "run_flops": step_flops * config.max_steps,
        "flops_per_second": step_flops / pace.step if pace else None,
        "step_seconds": pace.step if pace else None,
        "seconds": timing.run_seconds(config, text, pace) if pace else None,
        "text_tokens": text.tokens,
    }
