"""Choose a run for a given time: look at the text, choose its tokens, measure the machine, propose the run."""

import dataclasses
import string
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.config import MODEL_FIELDS, TrainConfig, from_settings
from llm.config.recipe import MUON_SETTINGS
from llm.machine.device import choose_device
from llm.plan import proposal, rule
from llm.plan.arithmetic import MEASURED_SHAPE_BYTES, TRAINED_BPE_BYTES
from llm.plan.forecast import short, spoken
from llm.plan.prediction import of_choice
from llm.plan.prediction.loss import Prediction
from llm.plan.proposal import Measure, Proposal
from llm.plan.request import Request
from llm.plan.steps import useful_steps
from llm.plan.text_facts import TextFacts, look_at
from llm.plan.text_size import Text, text_of, with_vocabulary
from llm.plan.timing import busy_line, preparing_seconds, tokenizing_seconds
from llm.prepare.reuse import default_folder, ensure, unused
from llm.prepare.shards import Progress
from llm.start import fine_tuning
from llm.start.init_from import starting_point
from llm.start.run_folder import refuse_existing
from llm.start.teacher import open_teachers, with_tokens
from llm.tokens.token_files import has_tokens, read_meta
from llm.tokens.tokenizer import Tokenizer
from llm.training.live import Deadline
from llm.weights import run_config

LARGE = 20_000_000  # bytes of a text from which the time to prepare it is announced
LATEST = 1.05  # of the time: then a run ends wherever its schedule is


@dataclass(frozen=True)
class TimedRun:
    """One of the runs that share a given time: its settings beside those that were given, and its seconds."""

    settings: dict[str, Any]
    seconds: float

    @property
    def folder(self) -> str:
        return str(self.settings["out_dir"])


@dataclass(frozen=True)
class Choice:
    """A run for a given time, and the facts that it follows from."""

    request: Request
    facts: TextFacts | None  # None: only the tokens of the text are known
    proposal: Proposal

    @property
    def seconds(self) -> float:
        """The seconds of the whole command: the given time, and what preparing the text takes beyond its share."""
        return self.request.seconds + self.proposal.text.uncounted

    @property
    def kept_bytes(self) -> int:
        """Bytes that the choice leaves in the process that trains."""
        trains_bpe = self.proposal.config.tokenizer == "bpe" and (
            self.proposal.text.unprepared > 0 or self.proposal.text.preparation > 0
        )
        return (self.proposal.measured - 1) * MEASURED_SHAPE_BYTES + trains_bpe * TRAINED_BPE_BYTES

    @property
    def calls_for_teachers(self) -> bool:
        """Whether the run would read its text so often that teachers, trained in a part of its time, bring more."""
        config, given = self.proposal.config, self.request.given
        is_free = not (config.init_from or config.teacher or "dropout" in given)
        count, _ = rule.teachers(self.request.seconds, config.model.dropout > 0)
        is_long = count > 0 and config.max_steps >= rule.LEAST_TAUGHT_STEPS
        return is_free and is_long and (self.passes >= rule.LEAST_TAUGHT_PASSES or config.model.dropout > 0)

    @property
    def passes(self) -> float:
        """How often the run reads its text."""
        config = self.proposal.config
        return config.max_steps * config.tokens_per_step / self.proposal.text.tokens

    def timed_runs(self, overwrite: bool) -> list[TimedRun]:
        """Return the runs that share the time: teachers, in folders beside that of the run, then the run itself.

        Its seconds are those that the teachers leave.
        """
        config, seconds = self.proposal.config, self.request.seconds
        count, share = rule.teachers(seconds, config.model.dropout > 0)
        out_dir = Path(config.out_dir)
        letters = string.ascii_lowercase[:count]
        names = [f"{out_dir}-teacher-{letter}" for letter in letters] if count > 1 else [f"{out_dir}-teacher"]
        is_ours = overwrite and (out_dir / "config.toml").is_file() and run_config(out_dir).teacher == tuple(names)
        folders = [name if is_ours else unused(name) for name in names]
        seeds = [(config.seed + number * rule.SEED_STEP) % 2**63 for number in range(count)]
        size = config.model.block_size  # of all
        teachers = [
            TimedRun({"out_dir": folder, "seed": seed, "block_size": size}, share * seconds / count)
            for folder, seed in zip(folders, seeds, strict=True)
        ]
        last = {"out_dir": config.out_dir, "seed": config.seed, "block_size": size, "teacher": folders}
        return [*teachers, TimedRun(last, seconds - sum(run.seconds for run in teachers))]

    def teacher_words(self, teachers: Sequence[TimedRun]) -> str:
        """Return a line that says why there are teachers first, and where."""
        why = f"in {short(self.passes)} passes one model would begin to learn this text by heart: first "
        if len(teachers) == 1:
            whose, they = f"for a teacher in {teachers[0].folder}", "it predicts"
        else:
            *folders, last = (run.folder for run in teachers)
            whose, they = f"for each teacher in {', '.join(folders)} and {last}", "they predict"
        return f"{why}{spoken(teachers[0].seconds)} {whose}, then a run that learns from what {they}, too"

    @property
    def predicted(self) -> Prediction | str:
        """The loss at the end, or why it cannot be predicted."""
        return of_choice.predicted(self.proposal.config, self.request.given, self.facts, self.request.teachers)

    def deadline(self, began: float) -> Deadline:
        """Return when the run has to end if its time began at `began`, as `time.perf_counter` counts."""
        steps = useful_steps(self.proposal.config, self.request, self.proposal.text)
        latest = max(LATEST * self.seconds, self.proposal.config.max_time or 0.0)
        return Deadline(began + self.seconds, int(min(steps, 1e9)), began + latest)


def choose_new_run(
    request: Request,
    overwrite: bool,
    say: Callable[[str], None],
    progress: Progress | None = None,
    measure: Measure | None = None,
) -> Choice:
    """Prepare the text and return the run for the time of `request`. Raises UserError, before any work if it can.

    `measure` returns the pace of a config; unless it is given, this process measures it alone.
    """
    choose_device(request.config.device)
    refuse_existing(Path(request.config.out_dir), overwrite)
    return choose_run(request, prepares=True, say=say, progress=progress, measure=measure)


def choose_run(
    request: Request,
    prepares: bool,
    say: Callable[[str], None],
    progress: Progress | None = None,
    measure: Measure | None = None,
) -> Choice:
    """Return the run for the time of `request`. With `prepares`, the text is tokenized first, else its tokens may be
    estimated. Raises UserError.
    """
    weights_tokenizer = None
    if request.config.init_from:
        request, weights_tokenizer = with_weights(request, say)
    if request.config.teacher and not request.teachers:  # else they are planned, too
        request, tokenizer = with_teachers(request, say)
        weights_tokenizer = weights_tokenizer or tokenizer
    facts = None
    has_tokenizer = has_own_tokens(request)
    if not has_tokenizer or (request.teachers and request.config.text):
        facts = look_at(request.config, say)
        if facts.train_bytes < rule.SMALL_TEXT:
            say(small_text(facts, request.config))
    if has_tokenizer and not request.config.init_from:
        request = with_tokenizer_there(request)
    if facts and not has_tokenizer and not request.config.init_from:
        chosen = rule.tokenizer(facts.train_bytes, facts.bytes_per_character, facts.distinct, request.given)
        request = dataclasses.replace(request, config=from_settings(chosen, request.config))
    preparation = prepare_text(request, facts, say, progress, weights_tokenizer) if prepares else 0.0
    text = dataclasses.replace(text_of(request.config, weights_tokenizer), preparation=preparation)
    text = with_uncounted(text, request.seconds)
    if not request.config.init_from:
        request = dataclasses.replace(request, config=with_vocabulary(request.config, text.vocabulary))
    choice = Choice(request, facts, proposal.propose(request, text, measure or proposal.short_probe))
    if line := busy_line(choice.proposal.pace):
        steps = choice.proposal.config.max_steps
        if steps <= rule.LEAST_STEPS:
            line += f": {steps} steps are planned, and the run takes more if the machine becomes faster"
        say(line)
    return choice


def choose_all(request: Request, say: Callable[[str], None], announce: Callable[[str], None]) -> list[Choice]:
    """Return the runs that `train --time` would train for `request`, in their order: teachers come before their run.

    Nothing is trained, so the text may be estimated. `announce` gets a line where there are teachers, which says why.
    Raises UserError.
    """
    whole = choose_run(request, prepares=False, say=say)
    if not whole.calls_for_teachers:
        return [whole]
    *teachers, last = whole.timed_runs(overwrite=False)
    announce(whole.teacher_words(teachers))
    chosen: list[Choice] = []
    shapes = []
    for run in teachers:
        chosen += choose_all(with_given(request, run), say, announce)
        shapes.append(chosen[-1].proposal.config.model)
    left = last.seconds - whole.proposal.probes * rule.probe_seconds(request.seconds)
    taught = with_given(request, TimedRun(last.settings, left))
    taught = dataclasses.replace(taught, teachers=tuple(shapes))
    return [*chosen, choose_run(taught, prepares=False, say=say)]


def with_given(request: Request, run: TimedRun) -> Request:
    """Return the request for a part of its time, with the settings of that as given too."""
    config = from_settings(run.settings, request.config)
    return dataclasses.replace(request, config=config, given=request.given | run.settings, seconds=run.seconds)


def small_text(facts: TextFacts, config: TrainConfig) -> str:
    """Return a line for a text of less than SMALL_TEXT: what to expect of it, and what would help."""
    remedies = "more text helps most (--text takes several files and folders)"
    if not config.init_from:
        remedies += ", then the weights of a run on a longer text like it (--init_from RUN)"
    return (
        f"{facts.train_bytes:,} bytes to train on are little to learn a language from, and a loss on "
        f"{facts.validated_bytes(config.val_fraction):,.0f} bytes is a rough measure; {remedies}"
    )


def with_weights(request: Request, say: Callable[[str], None]) -> tuple[Request, Tokenizer | None]:
    """Return the request with the shape and the tokenizer of the weights of `init_from` as given, and the tokenizer."""
    start = starting_point(request.config, say, request.given)
    config = start.config
    settings = {name: getattr(config.model, name) for name in MODEL_FIELDS if name != "dropout"}
    settings["tokenizer"] = config.tokenizer
    epochs: float = request.most_epochs
    if start.is_pretrained:
        chosen = fine_tuning.settings(config.model, request.given)
        if not request.given.keys() & {"optimizer", *MUON_SETTINGS}:
            chosen["optimizer"] = "adamw"  # which such models were trained with
        if "dropout" not in request.given:
            chosen["dropout"] = 0.0  # few passes; they are large because they have learned from other texts
        config = from_settings(chosen, config)
        settings |= chosen
        epochs = fine_tuning.EPOCHS
        if "block_size" not in request.given:
            del settings["block_size"]  # at most that of `config`, if the time suits it
    given = request.given | settings
    return dataclasses.replace(request, config=config, given=given, most_epochs=epochs), start.tokenizer


def with_teachers(request: Request, say: Callable[[str], None]) -> tuple[Request, Tokenizer | None]:
    """Return the request with the shapes of the teachers and, as given, their tokens; and their tokenizer."""
    teachers = open_teachers(request.config)
    config, given = request.config, request.given
    if not config.init_from:  # else the tokens are those of its weights
        config = with_tokens(config, teachers, say)
        names = "tokenizer", "vocab_size", "data_dir"
        given = given | {name: value for name in names if (value := getattr(config, name)) is not None}
    shapes = tuple(teacher.config for teacher in teachers)
    return dataclasses.replace(request, config=config, given=given, teachers=shapes), teachers[0].tokenizer


def has_own_tokens(request: Request) -> bool:
    """Return whether the run trains on token files that are there already and whose tokenizer is not chosen."""
    config = request.config
    return (not config.text or config.data_dir is not None) and has_tokens(Path(config.data_dir or "data"))


def with_uncounted(text: Text, seconds: float) -> Text:
    """Return the text with the seconds that preparing it takes beyond PREPARING_SHARE of the time as `uncounted`."""
    return dataclasses.replace(text, uncounted=max(0.0, preparing_seconds(text) - rule.PREPARING_SHARE * seconds))


def with_tokenizer_there(request: Request) -> Request:
    """Return the request with the tokenizer that its token files were made with, unless the user gave one."""
    meta = read_meta(Path(request.config.data_dir or "data")) or {}  # another program's files have none
    made = meta.get("settings")
    if not request.config.text or not isinstance(made, dict):
        return request
    names = {"tokenizer", "vocab_size"} - request.given.keys()
    chosen = {name: made[name] for name in names if made.get(name) is not None}
    return dataclasses.replace(request, config=from_settings(chosen, request.config))


def prepare_text(
    request: Request,
    facts: TextFacts | None,
    say: Callable[[str], None],
    progress: Progress | None,
    tokenizer: Tokenizer | None,
) -> float:
    """Tokenize the text if that has not been done; return the seconds that it took.

    Raises UserError if the token files that are there are those of another text or other settings.
    """
    was_there = has_tokens(Path(request.config.data_dir or default_folder(request.config)))
    size = facts.train_bytes / (1 - request.config.val_fraction) if facts and not was_there else 0.0
    seconds = tokenizing_seconds(size, request.config.tokenizer == "bpe" and tokenizer is None)
    if size > LARGE:
        say(f"preparing {size / 1e6:,.0f} MB of text takes at least {spoken(seconds)}, once")
    start = time.perf_counter()
    ensure(request.config, progress=progress, say=say, given=tokenizer)
    return 0.0 if was_there else time.perf_counter() - start
