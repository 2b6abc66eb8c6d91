"""A run in one piece, to share: what it was, what it came to, what it wrote and on what it was trained.

`gather` collects it from the run folder; `report_page.py` and `report_markdown.py` write it down. Only the record and
the settings have to be there: a part that is missing (token files that went away, weights not saved yet) says so in its
place. Folders are named by their last part, since a report is for others to read.
"""

import math
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from llm import __version__, storage
from llm.bands import Band, band_of_run
from llm.config import FIELDS, TrainConfig, from_settings, to_settings
from llm.data import TokenData
from llm.device import choose_device, choose_dtype, precision
from llm.errors import Failure, UserError
from llm.explain import explain
from llm.lines import Row
from llm.memorised import draw, longest_seen, run_tokens, share_seen, spread_windows
from llm.metrics import best, losses, read_record
from llm.model import GPT
from llm.plot import plain, thinned
from llm.run import Run
from llm.run_data import Say
from llm.tokenizer import Ids, Tokenizer, gpt2, load_tokenizer
from llm.tokens import GPT2_VOCAB, Tokens, read_meta

SAMPLES, SAMPLE_LENGTH = 24, 4000  # samples shown, and characters of each: they keep a report small
EVALUATIONS = 60  # rows of the table of evaluations
TOKENS = 12  # most and least frequent ones shown
COUNTED = 2**27  # training tokens counted; of more, evenly spread pieces
PIECE = 2**20
TEMPERATURES = (0.5, 0.8, 1.0)
N = 8  # tokens in a row: few enough to occur, enough to be rare by chance
DRAWN = 2000  # tokens drawn at each temperature
QUICK = 10**8  # training tokens; to look through more takes longer than a report should
PASSAGE = 300  # characters of the longest passage shown
FOLDERS = ("data_dir", "out_dir", "init_from", "text")  # settings that are paths
OWN = ("data_dir", "out_dir", "vocab_size", "sample_prompt", "dtype", "device")  # what another run would find itself
VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥"}
MISLEADING = {*range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)}
SHOWN = {i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t"} | dict.fromkeys((*MISLEADING, 0xFFFE, 0xFFFF), "�")


class Sample(NamedTuple):
    """A text written at an evaluation."""

    step: int
    loss: float
    prompt: str
    text: str  # without the prompt
    left_out: int  # characters
    notable: bool  # the first, the last, that of the best evaluation


class Evaluation(NamedTuple):
    """A line of the run: losses in nats per token, `train` the mean over the steps since the line before."""

    step: int
    lr: float | None
    train: float | None
    val: float
    bits_per_byte: float | None
    seconds: float | None


class Frequency(NamedTuple):
    """A token and how often it stands in the training text."""

    token: str
    id: int
    times: int
    share: float


class Seen(NamedTuple):
    """What of some samples stands in the training text word for word."""

    what: str
    share: float | None  # of the N-grams
    longest: int  # tokens
    passage: str


@dataclass(frozen=True)
class Memory:
    """Samples looked for in the training text."""

    weights: str  # the file
    tokens: int  # drawn at each temperature
    seen: Sequence[Seen]  # by temperature, and of the validation text


@dataclass(frozen=True)
class Card:
    """What a run was trained on. `facts` are named values in words."""

    facts: Sequence[tuple[str, str]]
    trouble: str | None = None  # why the token files could not be looked at
    most: Sequence[Frequency] = ()
    least: Sequence[Frequency] = ()
    unseen: int = 0  # tokens of the vocabulary that the training text does not have
    counted: int = 0  # training tokens counted
    source: str | None = None  # name of the text
    train_tokens: int | None = None


@dataclass(frozen=True)
class Report:
    """A run, ready to be written down. A `memory` that is a text says why there is none; None: not asked for."""

    name: str
    config: TrainConfig
    rows: list[Row]
    band: Band | None
    parameters: int
    verdicts: Sequence[str]
    evaluations: Sequence[Evaluation]
    samples: Sequence[Sample]
    samples_in_all: int
    environment: Sequence[tuple[str, str]]
    card: Card
    memory: Memory | str | None
    run_dir: Path
    made: str
    version: str = __version__

    @property
    def step(self) -> int:
        """Steps done."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def complete(self) -> bool:
        return self.step >= self.config.max_steps

    @property
    def lowest(self) -> Row | None:
        """The best evaluation."""
        return best(self.rows)

    @property
    def seconds(self) -> float | None:
        return last(self.rows, "seconds")

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.step * self.config.tokens_per_step

    @property
    def text(self) -> str:
        """What it was trained on, in a few words."""
        words = self.card.source or ", ".join(spelled_words("text", self.config.text)) or "a text of unknown origin"
        return plain(words, 60)

    @property
    def perplexity(self) -> float | None:
        """exp of the best loss: among how many equally likely tokens one would be as unsure."""
        return math.exp(self.lowest["loss"]) if self.lowest and self.lowest["loss"] < 20 else None

    @property
    def epochs(self) -> float | None:
        """How many times the training text was read, in tokens drawn; None where its size is not known."""
        return self.tokens / self.card.train_tokens if self.card.train_tokens else None

    def middle(self, key: str) -> float | None:
        """The median of a number over the training rows."""
        values = [row[key] for row in self.rows if row["split"] == "train" and row[key] is not None]
        return statistics.median(values) if values else None

    def points(self, key: str, split: str = "train") -> list[tuple[float, float]]:
        """(step, value) of a number, at most `plot.POINTS`, neighbours averaged."""
        return list(thinned([(r["step"], r[key]) for r in self.rows if r["split"] == split and r[key] is not None]))

    def chosen(self) -> list[tuple[str, str, bool]]:
        """Every setting: its name, its value, and whether it differs from the chapter's recipe."""
        differing = differing_settings(self.config)
        values = to_settings(self.config)
        return [(name, spelled(name, values[name]), name in differing) for name in FIELDS if name in values]

    def command(self) -> str:
        """What to type for such a run."""
        values = differing_settings(self.config)
        values = differing_settings(self.config)
        command = ["losscurve train"]
        for name, value in values.items():
            words = spelled_words(name, value)
            dashed = any(word.startswith("-") for word in words)  # which would be taken for a flag
            command += (
                [shlex.quote(f"--{name}={word}") for word in words] if dashed else [f"--{name}", shlex.join(words)]
            )
        return " ".join(command)


def gather(run_dir: Path, data_dir: str | None = None, memorised: bool = True, say: Say = lambda line: None) -> Report:
    """All there is to say of the run in `run_dir`; its token files are looked for in `data_dir` where it is given.

    Raises UserError where there is no run, its record is damaged, or a given `data_dir` does not hold its data.
    """
    run, rows = Run.open(run_dir), read_record(run_dir)
    band = band_of_run(run_dir)
    trouble: list[str] = []
    tokenizer = tokenizer_of(run, trouble)
    data: TokenData | str
    try:
        data = run_tokens(run, data_dir, say)
    except (UserError, OSError) as error:
        if data_dir is not None:  # a person said where
            raise
        data = without_folders(str(error), run)
    samples = samples_of(run, rows)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPT(run.config.model).parameters())
    kept = {sample.step for sample in evenly(samples, SAMPLES)}
    return Report(
        name=plain(run_dir.resolve().name, 60),
        config=run.config,
        rows=rows,
        band=band,
        parameters=parameters,
        verdicts=explain(rows, replace(run.config, out_dir=PurePath(run.config.out_dir).name or "."), band),
        evaluations=evaluations_of(rows),
        samples=[sample for sample in samples if sample.step in kept or sample.notable],
        samples_in_all=len(samples),
        environment=environment_of(run_dir),
        card=card_of(run, data, tokenizer, trouble),
        memory=memory_of(run, data, tokenizer) if memorised else None,
        run_dir=run_dir,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def tokenizer_of(run: Run, trouble: list[str]) -> Tokenizer | None:
    """The run's tokenizer, for tokens of unknown origin GPT-2's if it is on this machine; None, with the reason in
    `trouble`, where there is none or it is damaged."""
    try:
        if (run.path / "tokenizer.json").exists():
            return load_tokenizer(run.path / "tokenizer.json")
        if run.config.model.vocab_size >= GPT2_VOCAB:
            return gpt2(offline=True)
        trouble.append("the run has no tokenizer.json, so tokens are shown by their ids")
    except UserError as error:
        trouble.append(without_folders(str(error), run))
    except Failure:
        trouble.append("the run has no tokenizer.json and GPT-2's is not here, so tokens are shown by their ids")
    return None


def samples_of(run: Run, rows: list[Row]) -> list[Sample]:
    """Return the samples of a run, each cut to SAMPLE_LENGTH characters; none where they cannot be read."""
    try:
        written = run.samples
    except UserError:
        return []
    low, found = best(rows), []
    for place, sample in enumerate(written):
        prompt = visible(sample.prompt)[:SAMPLE_LENGTH]
        kept = SAMPLE_LENGTH - len(prompt)
        notable = place in (0, len(written) - 1) or (low is not None and sample.step == low["step"])
        left_out = max(0, len(sample.text) - kept)
        found.append(Sample(sample.step, sample.val_loss, prompt, visible(sample.text[:kept]), left_out, notable))
    return found


def evenly(items: list[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spread, the first and the last among them."""
    return items if len(items) <= most else [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]


def evaluations_of(rows: list[Row]) -> list[Evaluation]:
    """The lines of a run, at most EVALUATIONS and the best, evenly spread."""
    train, before, lines = losses(rows, "train"), -1, []
    position = 0
    for row in (row for row in rows if row["split"] == "val" and row["loss"] is not None):
        since = []
        while position < len(train) and train[position][0] <= row["step"]:
            since += [train[position][1]] if train[position][0] > before else []
            position += 1
        mean = math.fsum(since) / len(since) if since else None
        lines.append(Evaluation(row["step"], row["lr"], mean, row["loss"], row["bits_per_byte"], row["seconds"]))
        before = row["step"]
    low = min(lines, key=lambda line: line.val, default=None)
    kept = {line.step for line in [*evenly(lines, EVALUATIONS), *([low] if low else [])]}
    return [line for line in lines if line.step in kept]


def environment_of(run_dir: Path) -> list[tuple[str, str]]:
    """env.json as named values."""
    try:
        facts = storage.read_json(run_dir / "env.json")
    except UserError:
        return []
    if not isinstance(facts, dict):
        return []
    data = facts.pop("data", None)
    sums = [(f"SHA-256 of {name}", value) for name, value in data.items()] if isinstance(data, dict) else []
    named = [(str(name), value) for name, value in facts.items() if value is not None]
    return [(plain(name, 60), plain(str(value), 120)) for name, value in [*named, *sums][:40]]


def card_of(run: Run, data: TokenData | str, tokenizer: Tokenizer | None, trouble: list[str]) -> Card:
    """Sizes, tokenizer, most and least frequent tokens."""
    kinds = {"gpt2": "GPT-2's BPE", "bpe": "a BPE trained on the text", "byte": "bytes", "char": "characters"}
    kind = f"{kinds[tokenizer.kind]}, {tokenizer.vocab_size:,} tokens" if tokenizer else "not known: ids only"
    facts = [("tokenizer", kind)]
    if isinstance(data, str):
        return Card(facts, "; ".join([data, *trouble]))
    facts = [("text", plain(data.source, 60)), *facts]
    facts += [("training tokens", f"{len(data.train):,}"), ("validation tokens", f"{len(data.val):,}")]
    counts, counted = count(data.train, max(data.vocab_size, run.config.model.vocab_size))
    order = np.argsort(-counts, kind="stable")
    used = order[counts[order] > 0]

    def listed(ids: npt.NDArray[Any]) -> list[Frequency]:
        return [Frequency(shown(i, tokenizer), i, int(counts[i]), float(counts[i] / counted)) for i in ids.tolist()]

    vocabulary = tokenizer.vocab_size if tokenizer else data.vocab_size
    entropy = -math.fsum(p * math.log(p) for p in (counts[used] / counted).tolist())
    facts += [("vocabulary found in the training text", f"{len(used):,} of {vocabulary:,}")]
    facts += [("entropy of the token frequencies", f"{entropy:.3f} nats"), *prepared(data)]
    least = used[::-1][: min(TOKENS, max(0, len(used) - TOKENS))]
    return Card(
        facts,
        "; ".join(trouble) or None,
        listed(used[:TOKENS]),
        listed(least),
        max(0, vocabulary - len(used)),
        counted,
        None if data.foreign else data.source,
        len(data.train),
    )


def prepared(data: TokenData) -> list[tuple[str, str]]:
    """What meta.json tells of the text, as far as it does."""
    meta = read_meta(data.folder)
    if meta is None:
        return [("origin", "not known: the token files came without a meta.json")]
    source, splits = meta["source"], meta["splits"]
    facts = [(what, source.get(what)) for what in ("documents", "characters", "bytes")]
    facts += [("bytes per training token", _ratio(splits["train"].get("bytes"), len(data.train)))]
    named = [(what, f"{n:,}" if type(n) is int else f"{n:.2f}") for what, n in facts if type(n) in (int, float)]
    return named + (
        [("SHA-256 of the text", plain(source["sha256"], 80))] if isinstance(source.get("sha256"), str) else []
    )


def _ratio(size: Any, tokens: int) -> float | None:
    return size / tokens if type(size) is int else None


def count(tokens: Tokens, vocab_size: int) -> tuple[npt.NDArray[np.int64], int]:
    """How often each id stands in `tokens` (N,): counts (V,), and how many tokens were counted.

    All of them up to COUNTED; beyond, about as many, in evenly spread pieces.
    """
    counts, counted = np.zeros(vocab_size, np.int64), 0
    starts = range(0, len(tokens), PIECE)
    for start in starts[:: math.ceil(len(starts) * PIECE / (COUNTED + PIECE))]:
        piece = tokens[start : start + PIECE]
        counts += np.bincount(piece, minlength=vocab_size)
        counted += len(piece)
    return counts, counted


def memory_of(run: Run, data: TokenData | str, tokenizer: Tokenizer | None) -> Memory | str:
    """Samples of the best weights (else of the last) looked for in the training text; or why that was not done."""
    if isinstance(data, str):
        return f"Not looked for: {data}"
    if len(data.train) > QUICK:
        return f"Not looked for: {len(data.train):,} training tokens take a while; losscurve memorised does it."
    file = next((name for name in ("best.pt", "model.pt") if (run.path / name).is_file()), None)
    if file is None:
        return "Not looked for: no weights are saved yet."
    try:
        model, prompt = run.model("best" if file == "best.pt" else "last"), run.config.sample_prompt or "\n"
        begin = len(tokenizer.encode(prompt)) if tokenizer else 1
    except UserError as error:
        return f"Not looked for: {without_folders(str(error), run)}"
    length = min(200, max(32, run.config.model.block_size - begin))  # within the context, where drawing is fast
    size, device, found = (math.ceil(DRAWN / length), length), choose_device("auto"), []
    for heat in TEMPERATURES:
        with precision(choose_dtype("auto", device), device):
            samples = draw(model, data, tokenizer, prompt, size, run.config.seed, heat)
        found.append(seen(f"temperature {heat:g}", samples, data.train, tokenizer))
    usual = spread_windows(data.val, *size)
    found.append(seen("validation text", usual, data.train, tokenizer))
    return Memory(file, size[0] * size[1], found)


def seen(what: str, samples: Ids, tokens: Tokens, tokenizer: Tokenizer | None) -> Seen:
    """Share and longest passage of `samples` (S, T) that stand in `tokens` (N,)."""
    share, longest = share_seen(samples, tokens, N), longest_seen(samples, tokens)
    ids = tokens[longest.place : longest.place + longest.length]
    text = tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids.tolist()))
    line = visible(text[:PASSAGE]).replace("\n", VISIBLE["\n"])
    return Seen(what, share, longest.length, line + ("…" if len(text) > PASSAGE else ""))


def shown(token: int, tokenizer: Tokenizer | None) -> str:
    """A token as it can be seen: spaces and line breaks by signs, bytes that are no text as numbers."""
    if tokenizer is None:
        return str(token)
    content = tokenizer.decode_bytes([token])
    try:
        text = "".join(VISIBLE.get(character, character) for character in content.decode())
    except UnicodeDecodeError:
        return " ".join(f"0x{byte:02X}" for byte in content)
    return plain(visible(text), 40)


def visible(text: str) -> str:
    """A text whose control characters show as signs, and in which nothing turns the direction of what follows."""
    return text.replace("\r\n", "\n").translate(SHOWN)


def differing_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that are not those of the chapter's recipe, nor what another run would find itself."""
    given = {name: value for name, value in to_settings(config).items() if name not in OWN}
    if replace(config, warmup_steps=None).warmup == config.warmup:
        given.pop("warmup_steps", None)
    if replace(config, min_lr=None).final_lr == config.final_lr:
        given.pop("min_lr", None)
    usual = to_settings(from_settings({}))
    return {name: value for name, value in given.items() if usual.get(name) != value}


def spelled(name: str, value: Any) -> str:
    """A setting's value in words."""
    return plain(", ".join(spelled_words(name, value)), 120)


def spelled_words(name: str, value: Any) -> list[str]:
    """A setting's value as the words of a command, folders by their last part."""
    words = [str(word) for word in value] if isinstance(value, tuple) else [str(value)]
    if isinstance(value, bool):
        words = [words[0].lower()]
    return [plain(PurePath(word).name or word if name in FOLDERS else word, 120) for word in words]


def without_folders(message: str, run: Run) -> str:
    """A message in which a run's folders are named by their last part."""
    for folder in (run.path, Path(run.config.data_dir or "data")):
        for name in {str(folder), str(folder.resolve())}:
            message = message.replace(name, PurePath(name).name or name)
    return visible(message)


def last(rows: list[Row], key: str) -> float | None:
    """A number of the last row that has it."""
    return next((row[key] for row in reversed(rows) if row[key] is not None), None)


def writable(out: Path, mark: bytes) -> None:
    """Raises UserError where `out` is something else than an earlier report, which begins with `mark`."""
    try:
        if out.is_symlink() or out.exists():
            if not out.is_file():
                raise UserError(f"{out}: not a file; give another --out")
            with open(out, "rb") as file:
                if not file.read(len(mark)) == mark:
                    raise UserError(f"{out}: there is something else than a report; give another --out")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another --out") from None
