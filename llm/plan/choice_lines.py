"""Five lines about a run that was chosen for a given time: text, machine, model, run and loss, each with its reason."""

from collections.abc import Iterator

from llm.config import GPTConfig
from llm.config.counts import count_parameters, flops_per_token
from llm.machine.device import choose_device, choose_dtype, describe_device
from llm.plan import rule
from llm.plan.autopilot import Choice
from llm.plan.forecast import counted, short, spoken
from llm.plan.prediction.loss import Prediction
from llm.plan.timing import preparing_seconds, run_seconds

SHORT_PREPARATION = 0.1  # of the time: a preparation that takes less is not mentioned


def choice_lines(choice: Choice) -> Iterator[str]:
    """Yield the five lines."""
    yield f"text       {_text(choice)}"
    yield f"machine    {_machine(choice)}"
    yield f"model      {_model(choice)}"
    yield f"steps      {_steps(choice)}"
    yield f"loss       {_loss(choice.predicted)}"


def _text(choice: Choice) -> str:
    config, text, facts = choice.proposal.config, choice.proposal.text, choice.facts
    tokens = f"{text.tokens:,} training tokens"
    if text.unprepared:  # estimated: three digits
        tokens = f"about {round(text.tokens, 3 - len(str(text.tokens))):,} training tokens"
    if facts is None:
        return f"{tokens}, vocabulary {text.vocabulary:,}, as its token files have them"
    distinct = "" if facts.distinct is None else f", {counted(facts.distinct, 'distinct character')}"
    if facts.bytes_per_character >= rule.MANY_BYTES:
        distinct += f" of {facts.bytes_per_character:.1f} bytes each"
    size = f" of {config.vocab_size:,}" if config.tokenizer == "bpe" and config.vocab_size else ""
    kind = "the weights' own" if config.init_from else config.tokenizer
    return f"{facts.train_bytes:,} bytes to train on{distinct}: {kind} tokens{size}, {tokens}{_preparation(choice)}"


def _preparation(choice: Choice) -> str:
    """Return how long preparing the text takes, "" if that does not matter."""
    text, request = choice.proposal.text, choice.request
    seconds = preparing_seconds(text)
    if seconds < SHORT_PREPARATION * request.seconds:
        return ""
    words = (
        f"; preparing it takes at least {spoken(seconds)}" if text.unprepared else f"; prepared in {spoken(seconds)}"
    )
    if not text.uncounted:
        return words
    return f"{words}, so the command takes {spoken(choice.seconds)} instead of {spoken(request.seconds)}"


def _machine(choice: Choice) -> str:
    config, pace, count = choice.proposal.config, choice.proposal.pace, choice.proposal.measured
    device = choose_device(config.device)
    rate = flops_per_token(config.model) * config.tokens_per_step / pace.step
    shapes = counted(count, "shape")
    return (
        f"{describe_device(device, choose_dtype(config.dtype, device))}: {rate / 1e9:,.0f} GFLOP/s in training, "
        f"{pace.step:.2g} s a step; {shapes} measured"
    )


def _model(choice: Choice) -> str:
    config, shapes = choice.proposal.config, choice.proposal.shapes
    model = config.model
    named = (
        f"{model.arch} {_shape(model)}, n_head {model.n_head}, block_size {model.block_size}, "
        f"{count_parameters(model) / 1e6:.2f} M parameters"
    )
    if config.init_from:
        return f"{named}: the weights of {config.init_from}"
    if len(shapes) == 1:
        return f"{named}: its shape is given"
    return f"{named}: of {_shape(shapes[0])} to {_shape(shapes[-1])} the largest that suits this time and this text"


def _shape(model: GPTConfig) -> str:
    return f"{model.n_layer} x {model.n_embd}"


def _steps(choice: Choice) -> str:
    config, text, pace = choice.proposal.config, choice.proposal.text, choice.proposal.pace
    trained = config.max_steps * config.tokens_per_step
    probing = choice.proposal.probes * rule.probe_seconds(choice.request.seconds)
    seconds = sum(run_seconds(config, text, pace, choice.request.teachers).values()) + probing
    is_capped = seconds - text.uncounted < 0.9 * rule.FILL * choice.request.seconds
    reason = "; more passes over this text gain little, more text would help" if is_capped else ""
    follows = "with" if choice.request.given.keys() & {"weight_decay", "dropout"} else "so"
    return (
        f"{config.max_steps:,} of {counted(config.windows_per_step, 'window')}, {short(trained / text.tokens)} epochs, "
        f"{follows} weight decay {config.weight_decay:g} and dropout {config.model.dropout:g}; "
        f"about {spoken(seconds)} of {spoken(choice.seconds)}{reason}"
    )


def _loss(predicted: Prediction | str) -> str:
    if isinstance(predicted, str):
        return f"no prediction: {predicted}"
    return f"{predicted} at the end, by what counts of its bytes tell of this text"
