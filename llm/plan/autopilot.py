"""Choose a run for a given time: look at the text, choose its tokens, measure the machine, propose the run."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llm.config import MODEL_FIELDS, from_settings
from llm.config.recipe import MUON_SETTINGS
from llm.machine.device import choose_device
from llm.plan import proposal, rule
from llm.plan.proposal import Proposal
from llm.plan.request import Request
from llm.plan.text_facts import TextFacts, look_at
from llm.plan.text_size import text_of, with_vocabulary
from llm.prepare.reuse import default_folder, ensure
from llm.prepare.shards import Progress
from llm.start import fine_tuning
from llm.start.init_from import starting_point
from llm.start.run_folder import refuse_existing
from llm.tokens.token_files import has_tokens
from llm.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Choice:
    """A run for a given time, and the facts that it follows from."""

    request: Request
    facts: TextFacts | None  # None: only the tokens of the text are known
    proposal: Proposal


def choose_new_run(
    request: Request, overwrite: bool, say: Callable[[str], None], progress: Progress | None = None
) -> Choice:
    """Prepare the text and return the run for the time of `request`. Raises UserError, before any work if it can."""
    choose_device(request.config.device)
    refuse_existing(Path(request.config.out_dir), overwrite)
    return choose_run(request, prepares=True, say=say, progress=progress)


def choose_run(
    request: Request, prepares: bool, say: Callable[[str], None], progress: Progress | None = None
) -> Choice:
    """Return the run for the time of `request`. With `prepares`, the text is tokenized first, else its tokens may be
    estimated. Raises UserError.
    """
    weights_tokenizer = None
    if request.config.init_from:
        request, weights_tokenizer = with_weights(request, say)
    facts = None
    if not has_own_tokens(request):
        facts = look_at(request.config)
    if facts and not request.config.init_from:
        chosen = rule.tokenizer(facts.train_bytes, facts.bytes_per_character, request.given)
        request = dataclasses.replace(request, config=from_settings(chosen, request.config))
    preparation = prepare_text(request, say, progress, weights_tokenizer) if prepares else 0.0
    text = dataclasses.replace(text_of(request.config), preparation=preparation)
    if not request.config.init_from:
        request = dataclasses.replace(request, config=with_vocabulary(request.config, text.vocabulary))
    return Choice(request, facts, proposal.propose(request, text, proposal.short_probe))


def with_weights(request: Request, say: Callable[[str], None]) -> tuple[Request, Tokenizer | None]:
    """Return the request with the shape and the tokenizer of the weights of `init_from` as given, and the tokenizer."""
    start = starting_point(request.config, say, request.given)
    config = start.config
    settings = {name: getattr(config.model, name) for name in MODEL_FIELDS if name != "dropout"}
    settings["tokenizer"] = config.tokenizer
    epochs: float = request.most_epochs
    if not start.is_ours:
        chosen = fine_tuning.settings(config.model, request.given)
        if not request.given.keys() & {"optimizer", *MUON_SETTINGS}:
            chosen["optimizer"] = "adamw"  # which such models were trained with
        config = from_settings(chosen, config)
        settings |= chosen
        epochs = fine_tuning.EPOCHS
        if "block_size" not in request.given:
            del settings["block_size"]  # at most that of `config`, if the time suits it
    given = request.given | settings
    return dataclasses.replace(request, config=config, given=given, most_epochs=epochs), start.tokenizer


def has_own_tokens(request: Request) -> bool:
    """Return whether the run trains on token files that are there already and whose tokenizer is not chosen."""
    config = request.config
    return (not config.text or config.data_dir is not None) and has_tokens(Path(config.data_dir or "data"))


def prepare_text(
    request: Request, say: Callable[[str], None], progress: Progress | None, tokenizer: Tokenizer | None
) -> float:
    """Tokenize the text if that has not been done; return the seconds that it took."""
    if has_tokens(Path(request.config.data_dir or default_folder(request.config))):
        return 0.0
    start = time.perf_counter()
    ensure(request.config, progress=progress, say=say, given=tokenizer)
    return time.perf_counter() - start
