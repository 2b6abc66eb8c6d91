"""Collect a report from a run folder.

Only the record and the settings have to be there: a part that is missing says so in its place. Folders
are named by their last part, since a report is for others to read.
"""

import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path, PurePath

import torch

from llm import storage
from llm.checks.memorised import run_tokens
from llm.data import TokenData
from llm.errors import Failure, UserError
from llm.model import GPT
from llm.record.bands import band_of_run
from llm.record.chart_style import plain
from llm.record.explain import explain
from llm.record.metrics import best, losses, read_record
from llm.report.card import card_of, memory_of
from llm.report.facts import Evaluation, Report, Sample
from llm.report.words import evenly, visible, without_folders
from llm.run import Run
from llm.start.run_data import Say
from llm.storage.lines import Row
from llm.tokens.bpe import gpt2
from llm.tokens.saved_tokenizer import load_tokenizer
from llm.tokens.token_files import GPT2_VOCAB
from llm.tokens.tokenizer import Tokenizer

SAMPLES, SAMPLE_LENGTH = 24, 4000  # samples shown, and characters of each: they keep a report small


EVALUATIONS = 60  # rows of the table of evaluations


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
