"""The predicted loss of a run that was chosen for a given time, or why there is none."""

from collections.abc import Collection, Sequence

from llm.config import GPTConfig, TrainConfig
from llm.config.counts import count_parameters
from llm.plan import rule
from llm.plan.arithmetic import run_flops
from llm.plan.prediction import loss
from llm.plan.prediction.loss import Prediction
from llm.plan.text_facts import LEAST_VALIDATED, TextFacts
from llm.plan.text_size import SAMPLE


def predicted(
    config: TrainConfig, given: Collection[str], facts: TextFacts | None, teachers: Sequence[GPTConfig]
) -> Prediction | str:
    """Return the loss at the end of a run, or why it cannot be predicted.

    `given`: the names of the settings that were given. `facts`: of its text, None if only its tokens are known.
    `teachers`: the shapes of the models that it learns from.
    """
    if config.init_from:
        return "its weights have learned from other texts"
    if any(count_parameters(teacher) > count_parameters(config.model) for teacher in teachers):
        return "no runs with a teacher larger than the model were measured"
    if facts is None:
        return "of its text only the tokens are known"
    if facts.cross_entropy is None:
        if facts.validated_bytes(config.val_fraction) < LEAST_VALIDATED:
            return f"a validation split of less than {LEAST_VALIDATED:,} bytes tells too little of this text"
        return f"its text has more than {SAMPLE / 1e6:.0f} million characters, or is given by a name"
    usual = rule.tokenizer(facts.train_bytes, facts.bytes_per_character, facts.distinct, {})
    changed = {name for name in given if name not in loss.OPEN} - {"tokenizer", "vocab_size"}
    if config.tokenizer != usual["tokenizer"]:
        changed.add("tokenizer")
    elif config.vocab_size != usual.get("vocab_size", config.vocab_size):
        changed.add("vocab_size")
    if changed:
        return f"no runs with a given {', '.join(sorted(changed))} were measured"
    return loss.predict(
        {
            "train_bytes": facts.train_bytes,
            "cross_entropy": facts.cross_entropy,
            "flops": run_flops(config),
            "steps": config.max_steps,
        }
    )
