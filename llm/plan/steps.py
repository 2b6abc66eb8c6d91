"""The steps and the evaluations that fit a given time at a measured pace."""

from llm.config import TrainConfig, from_settings
from llm.config.counts import count_parameters_by_part
from llm.errors import UserError
from llm.plan import rule
from llm.plan.arithmetic import bytes_copied_to_save
from llm.plan.request import Request
from llm.plan.text_size import Text
from llm.plan.timing import PICTURE_SECONDS, SAVING_RATE, Pace, starting_seconds, teaching_seconds, validated_tokens


def with_steps(config: TrainConfig, request: Request, text: Text, pace: Pace, probes: int) -> TrainConfig:
    """Return `config` with as many steps as fit, and the evaluations that they allow. Raises UserError."""
    # beside other work fewer may fit; the run gets more once the machine is faster, or ends by max_time
    steps = max(rule.LEAST_STEPS, affordable_steps(config, request, text, pace, probes))
    warmup = request.given.get("warmup_steps", 0)
    if warmup >= steps:
        raise UserError(f"warmup_steps = {warmup}: only {steps} steps fit this time; lower it, or give more --time")
    every = request.given.get("eval_every", -(-steps // count_evaluations(config, request, pace)))
    return from_settings(
        {"max_steps": steps, "eval_every": every, "eval_tokens": eval_tokens(config, request, pace)}, config
    )


def affordable_steps(config: TrainConfig, request: Request, text: Text, pace: Pace, probes: int) -> int:
    """Return the steps that fit after `probes`, at most the useful ones."""
    evaluation = _other_seconds(config, pace) + _validation_seconds(config, request, text, pace)
    starting = starting_seconds(text) - text.uncounted + teaching_seconds(config, text, pace, request.teachers)
    seconds = rule.FILL * request.seconds - starting - probes * rule.probe_seconds(request.seconds) - evaluation
    step = pace.step
    if "eval_every" in request.given:
        step += evaluation / request.given["eval_every"]
    else:
        seconds -= evaluation * count_evaluations(config, request, pace)
    return max(0, int(min(seconds / step, useful_steps(config, request, text), 1e9)))


def useful_steps(config: TrainConfig, request: Request, text: Text) -> float:
    """Return the most steps that are useful: those of the most passes, fewer for a model that is large for its text."""
    passes_of_a_step = config.tokens_per_step / text.tokens
    enough = max(rule.ENOUGH_STEPS, rule.MOST_REPETITION / parameters_per_token(config, text) / passes_of_a_step)
    if config.teacher:
        enough *= rule.TAUGHT_LONGER
    return max(rule.LEAST_STEPS, min(request.most_epochs / passes_of_a_step, enough))


def parameters_per_token(config: TrainConfig, text: Text) -> float:
    """Return the parameters of the blocks for each training token."""
    return count_parameters_by_part(config.model)["blocks"] / text.tokens


def count_evaluations(config: TrainConfig, request: Request, pace: Pace) -> int:
    """Return the evaluations besides the one at the start: half their share of the time is for all but validation."""
    least, most = rule.EVALUATIONS
    affordable = rule.EVALUATION_SHARE * request.seconds / 2 / _other_seconds(config, pace)
    return max(least, min(most, int(affordable) - 1))


def eval_tokens(config: TrainConfig, request: Request, pace: Pace) -> int:
    """Return the tokens of an evaluation: the other half of that share is for validation."""
    if "eval_tokens" in request.given:
        return config.eval_tokens
    passes = (1 + count_evaluations(config, request, pace)) * (2 if config.ema else 1)
    affordable = rule.EVALUATION_SHARE * request.seconds / 2 / (passes * pace.evaluated_token)
    return max(rule.LEAST_EVAL_TOKENS, min(config.eval_tokens, int(affordable)))


def _other_seconds(config: TrainConfig, pace: Pace) -> float:
    """Return the seconds of a picture, a sample and a checkpoint."""
    return PICTURE_SECONDS + config.sample_tokens * pace.sampled_token + bytes_copied_to_save(config) / SAVING_RATE


def _validation_seconds(config: TrainConfig, request: Request, text: Text, pace: Pace) -> float:
    tokens = validated_tokens(from_settings({"eval_tokens": eval_tokens(config, request, pace)}, config), text)
    return (2 if config.ema else 1) * tokens * pace.evaluated_token
