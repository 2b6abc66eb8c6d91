"""Collect the content of a report from a run folder.

Only the record and the settings are required. A part that is missing is reported as missing. Folders are named by their
last part, because a report is meant to be shared.
"""

import math
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path, PurePath

from llm import storage
from llm.checks.memorised import run_tokens
from llm.config.counts import count_parameters
from llm.data import TokenData
from llm.errors import Failure, UserError
from llm.record.bands import band_of_run
from llm.record.chart_style import plain
from llm.record.explain import explain
from llm.record.metrics import best, losses, read_record
from llm.record.points import pick_evenly
from llm.record.runs import origin_lines
from llm.report.card import make_card
from llm.report.facts import Evaluation, Report, Sample
from llm.report.memorisation import measure_memorisation
from llm.report.words import shorten_folders, show_controls
from llm.run import Run
from llm.start.run_folder import Say
from llm.storage.lines import Row
from llm.tokens.bpe import gpt2
from llm.tokens.saved_tokenizer import load_tokenizer
from llm.tokens.token_files import GPT2_VOCAB
from llm.tokens.tokenizer import Tokenizer

SAMPLES = 24  # in a report; this limit and the next keep the file small
SAMPLE_LENGTH = 4000  # characters of a sample
EVALUATIONS = 60  # rows of the table of evaluations
ENVIRONMENT = 40  # lines of env.json


def gather(run_dir: Path, data_dir: str | None = None, memorised: bool = True, say: Say = lambda line: None) -> Report:
    """Return the report of the run in `run_dir`.

    Args:
        data_dir: the run's token files, if they have moved.
        memorised: generate samples and search for them in the training text.
        say: called with notices about the token files.

    Raises:
        UserError: there is no run, its record is damaged, or `data_dir` does not hold the run's data.
    """
    run = Run.open(run_dir)
    rows = read_record(run_dir)
    band = band_of_run(run_dir)
    tokenizer, trouble = find_tokenizer(run)
    data = _open_tokens(run, data_dir, say)
    samples = collect_samples(run, rows)
    listed = {sample.step for sample in pick_evenly(samples, SAMPLES)}
    return Report(
        name=plain(run_dir.resolve().name, 60),
        config=run.config,
        rows=rows,
        band=band,
        parameters=count_parameters(run.config.model),
        verdicts=[
            *origin_lines(run_dir),
            *explain(rows, replace(run.config, out_dir=PurePath(run.config.out_dir).name or "."), band),
        ],
        evaluations=collect_evaluations(rows),
        samples=[sample for sample in samples if sample.step in listed or sample.notable],
        sample_count=len(samples),
        environment=read_environment(run_dir),
        card=make_card(run, data, tokenizer, trouble),
        memorisation=measure_memorisation(run, data, tokenizer) if memorised else None,
        run_dir=run_dir,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _open_tokens(run: Run, data_dir: str | None, say: Say) -> TokenData | str:
    """Return the run's token files, or why they cannot be read.

    Raises:
        UserError: the user gave `data_dir`, and it does not hold them.
    """
    try:
        return run_tokens(run, data_dir, say)
    except (UserError, OSError) as error:
        if data_dir is not None:
            raise
        return shorten_folders(str(error), run)


def find_tokenizer(run: Run) -> tuple[Tokenizer | None, list[str]]:
    """Return the run's tokenizer, or else GPT-2's if that fits and is on this machine, and what went wrong."""
    try:
        if (run.path / "tokenizer.json").exists():
            return load_tokenizer(run.path / "tokenizer.json"), []
        if run.config.model.vocab_size >= GPT2_VOCAB:
            return gpt2(offline=True), []
        return None, ["the run has no tokenizer.json, so tokens are shown as ids"]
    except UserError as error:
        return None, [shorten_folders(str(error), run)]
    except Failure:
        return None, ["the run has no tokenizer.json and GPT-2's is not on this machine, so tokens are shown as ids"]


def collect_samples(run: Run, rows: list[Row]) -> list[Sample]:
    """Return the samples of a run, each cut to SAMPLE_LENGTH characters; none if they cannot be read."""
    try:
        written = run.samples
    except UserError:
        return []
    lowest = best(rows)
    found = []
    for place, sample in enumerate(written):
        prompt = show_controls(sample.prompt)[:SAMPLE_LENGTH]
        kept = SAMPLE_LENGTH - len(prompt)
        is_best = lowest is not None and sample.step == lowest["step"]
        found.append(
            Sample(
                step=sample.step,
                loss=sample.val_loss,
                prompt=prompt,
                text=show_controls(sample.text[:kept]),
                left_out=max(0, len(sample.text) - kept),
                notable=is_best or place in (0, len(written) - 1),
            )
        )
    return found


def collect_evaluations(rows: list[Row]) -> list[Evaluation]:
    """Return the evaluations of a run: evenly spaced ones, at most EVALUATIONS, and the best."""
    train = losses(rows, "train")
    evaluations: list[Evaluation] = []
    position = 0  # in `train`
    for row in rows:
        if row["split"] != "val" or row["loss"] is None:
            continue
        start = position
        while position < len(train) and train[position][0] <= row["step"]:
            position += 1
        before = evaluations[-1].step if evaluations else -1
        since = [loss for step, loss in train[start:position] if step > before]
        evaluations.append(
            Evaluation(
                step=row["step"],
                lr=row["lr"],
                train=math.fsum(since) / len(since) if since else None,
                val=row["loss"],
                bits_per_byte=row["bits_per_byte"],
                averaged=row["val_loss_ema"],
                seconds=row["seconds"],
            )
        )
    listed = {evaluation.step for evaluation in pick_evenly(evaluations, EVALUATIONS)}
    lowest = best(rows)
    if lowest:
        listed.add(lowest["step"])
    return [evaluation for evaluation in evaluations if evaluation.step in listed]


def read_environment(run_dir: Path) -> list[tuple[str, str]]:
    """Return env.json as names and values in words; an empty list if it cannot be read."""
    facts = storage.read_facts(run_dir / "env.json")
    data = facts.pop("data", None)
    if isinstance(origin := facts.get("forked_from"), dict) and isinstance(origin.get("run"), str):
        facts["forked_from"] = f"{PurePath(origin['run']).name}, step {origin.get('step')}, state {origin.get('state')}"
    pairs = [(str(name), value) for name, value in facts.items() if value is not None]
    if isinstance(data, dict):
        pairs += [(f"SHA-256 of {name}", value) for name, value in data.items()]
    return [(plain(name, 60), plain(str(value), 120)) for name, value in pairs[:ENVIRONMENT]]
