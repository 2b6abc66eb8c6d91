"""Propose a run for a given time: measure a few shapes, take the one that promises most, and fit the steps."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llm.config import GPTConfig, TrainConfig, from_settings
from llm.config.counts import flops_per_token
from llm.errors import UserError
from llm.plan import rule
from llm.plan.request import Request
from llm.plan.steps import affordable_steps, parameters_per_token, useful_steps, with_steps
from llm.plan.text_size import Text
from llm.plan.timing import Pace, fits, preparing_seconds, probe, starting_seconds

Measure = Callable[[TrainConfig, float], Pace]  # of a config, in about so many seconds
Shapes = dict[GPTConfig, TrainConfig]


@dataclass(frozen=True)
class Proposal:
    """A run for a given time, and what it was chosen from."""

    config: TrainConfig
    text: Text
    pace: Pace
    shapes: tuple[GPTConfig, ...]  # from small to large
    measured: int  # shapes
    probes: int  # of shapes, and of dropout


def short_probe(config: TrainConfig, seconds: float) -> Pace:
    """Measure a pace within about `seconds`, set-up and the pace of evaluations and samples included."""
    return probe(config, 0.6 * seconds)


def propose(request: Request, text: Text, measure: Measure) -> Proposal:
    """Return a run for the time of `request`, around its given settings. `request.config` knows the vocabulary.

    From the pace of the smallest shape it estimates the steps of every shape. Then it measures the shape that it would
    choose and estimates the others again, until the chosen one has been measured.

    Raises UserError if not even LEAST_STEPS steps of the smallest shape fit, and no other work is to blame.
    """
    shapes = {trial.model: trial for trial in candidates(request, text) if fits(trial)}
    if not shapes:
        raise UserError("memory: not even the smallest model fits in the memory here; give a smaller --batch_size")
    paces: dict[GPTConfig, Pace] = {}
    best = next(iter(shapes))
    while best not in paces and len(paces) < rule.probes(request.seconds):
        paces[best] = measure(shapes[best], rule.probe_seconds(request.seconds))
        if len(paces) == 1:
            check_time(shapes[best], request, text, paces[best])
        best = choose(shapes, request, text, {model: estimate(model, paces) for model in shapes})
    if best not in paces:
        best = choose(shapes, request, text, paces)
    return finish(shapes[best], request, text, paces, tuple(shapes), measure)


def choose(shapes: Shapes, request: Request, text: Text, paces: dict[GPTConfig, Pace]) -> GPTConfig:
    """Return the largest shape with a pace that gets GOOD_STEPS and suits the text; if there is none, the smallest."""
    possible = [model for model in shapes if model in paces]
    suitable = [model for model in possible if suits(shapes[model], request, text, paces[model])]
    return suitable[-1] if suitable else possible[0]


def finish(
    chosen: TrainConfig,
    request: Request,
    text: Text,
    paces: dict[GPTConfig, Pace],
    shapes: tuple[GPTConfig, ...],
    measure: Measure,
) -> Proposal:
    """Return the run of the chosen shape, with the regularisation that its passes call for."""
    pace = paces[chosen.model]
    probes = len(paces)
    config = with_chosen(chosen, request, regularisation(chosen, request, text, pace, probes))
    if config.model.dropout != chosen.model.dropout:  # dropout takes time, so that there are fewer epochs
        pace = measure(config, rule.probe_seconds(request.seconds))
        probes += 1
        config = with_chosen(config, request, regularisation(config, request, text, pace, probes))
    return Proposal(with_steps(config, request, text, pace, probes), text, pace, shapes, len(paces), probes)


def regularisation(config: TrainConfig, request: Request, text: Text, pace: Pace, probes: int) -> dict[str, float]:
    """Return weight decay, dropout and cool-down for the passes of `config` over its text.

    If it has dropout, it keeps at least the lowest one.
    """
    passes = affordable_steps(config, request, text, pace, probes) * config.tokens_per_step / text.tokens
    repetition = passes * parameters_per_token(config, text)
    if config.model.dropout:
        repetition = max(repetition, rule.DROPOUTS[1][1])
    return rule.regularisation(passes, repetition, config.schedule, bool(config.teacher))


def with_chosen(config: TrainConfig, request: Request, chosen: dict[str, Any]) -> TrainConfig:
    """Return `config` with the `chosen` settings that are not given."""
    return from_settings({name: value for name, value in chosen.items() if name not in request.given}, config)


def candidates(request: Request, text: Text) -> list[TrainConfig]:
    """Return the run in each shape that the given settings allow, from small to large."""
    given = request.given
    size = rule.block_size(request.seconds, text.tokens)
    if request.config.init_from:
        size = min(size, request.config.model.block_size)
    size = min([size, *(teacher.block_size for teacher in request.teachers)])
    config = with_chosen(request.config, request, {"block_size": size})
    config = from_settings(rule.batch(given, config.model.block_size, text.tokens), config)
    config = with_chosen(config, request, {"max_time": request.seconds + text.uncounted})
    if config.init_from:
        return [with_chosen(config, request, rule.rates(config, given))]
    found: Shapes = {}
    for row in rule.SHAPES:
        trial = from_settings(rule.shape(row, given), config)
        found.setdefault(trial.model, from_settings(rule.rates(trial, given), trial))
    return sorted(found.values(), key=lambda trial: flops_per_token(trial.model))


def estimate(model: GPTConfig, paces: dict[GPTConfig, Pace]) -> Pace:
    """Return the measured pace of a shape, or one derived from the measured shape that is most like it."""
    if model in paces:
        return paces[model]
    ratios = {other: flops_per_token(model) / flops_per_token(other) for other in paces}
    nearest = min(paces, key=lambda other: abs(math.log(ratios[other])))
    pace = paces[nearest]
    step = pace.step * ratios[nearest] ** rule.STEP_GROWTH
    evaluated = pace.evaluated_token * ratios[nearest] ** rule.STEP_GROWTH
    sampled = pace.sampled_token * model.n_layer / nearest.n_layer  # one token at a time: few FLOPs in each layer
    return Pace(step, evaluated, sampled, pace.others)


def suits(config: TrainConfig, request: Request, text: Text, pace: Pace) -> bool:
    """Return whether a shape gets GOOD_STEPS at a pace, and is not so large that it memorises the text."""
    most = rule.TAUGHT_PARAMETERS_PER_TOKEN if config.teacher else rule.PARAMETERS_PER_TOKEN
    if parameters_per_token(config, text) > most:
        return False
    steps = affordable_steps(config, request, text, pace, rule.probes(request.seconds))
    return steps >= min(rule.GOOD_STEPS, int(useful_steps(config, request, text)))


def check_time(config: TrainConfig, request: Request, text: Text, pace: Pace) -> None:
    """Raise UserError, with the time that it needs, if LEAST_STEPS steps of the smallest shape do not fit.

    Other work on this machine may have held up the measurement, and may end soon. Then the time is only too short if
    starting takes all of it.
    """
    steps = affordable_steps(config, request, text, pace, 1)
    starts_in_time = starting_seconds(text) - text.uncounted < rule.FILL * request.seconds
    if steps >= rule.LEAST_STEPS or (pace.is_disturbed and starts_in_time):
        return
    prepared = dataclasses.replace(text, unprepared=0, preparation=0.0, uncounted=0.0)
    needed = math.ceil(rule.PREPARING_SHARE * request.seconds)  # first without the preparation
    while affordable_steps(config, dataclasses.replace(request, seconds=needed), prepared, pace, 1) < rule.LEAST_STEPS:
        needed = math.ceil(1.1 * needed + 1)
    bounded = rule.FILL * needed / (rule.FILL - rule.PREPARING_SHARE)  # the preparation uses its whole share
    needed = math.ceil(min(needed + preparing_seconds(text) / rule.FILL, bounded))
    shape = f"{config.model.n_layer} layers x {config.model.n_embd}"
    raise UserError(
        f"time = {request.seconds:g} s: too short; {rule.LEAST_STEPS} steps of the smallest model here ({shape}) need "
        f"about {needed} s, with start and evaluations; give --time {needed}s or more"
    )
