"""Train the settings of a try in rounds, and stop early what is clearly behind.

The rule, successive halving with a paired test: at a third and at two thirds of the steps, each setting is compared,
once, with the leader, which has the lowest mean validation loss over the seeds. It stops if two things hold: it is in
the worse half, and Student's t over the pairs with the same seed calls it worse. The 5 % of this test are for all pairs
of settings (Holm) and for both looks together (Bonferroni). With fewer than 3 seeds nothing stops, and a setting with a
complete run never does, since there is little to save.

Sources: Jamieson and Talwalkar, Non-stochastic best arm identification and hyperparameter optimization (2016), for
successive halving; `paired` for the test.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from llm.experiments import recorded
from llm.experiments.compare import common_unit
from llm.experiments.jobs import Job, Stop, train_jobs
from llm.experiments.outcome import Losses, best_first, losses_at, read_run, read_runs, step_at
from llm.experiments.paired import FEWEST, Difference, holm, looks_at_best, paired_difference, verdict
from llm.experiments.trials import Setting, Try

CHECKS = (1 / 3, 2 / 3)  # shares of the steps

Say = Callable[[str], None]


def train_settings(
    tried: Try, settings: Sequence[Setting], given: frozenset[str], processes: int, stop: Stop, say: Say, checks: bool
) -> bool:
    """Train `settings` with all seeds, and stop those that are clearly behind; return whether nothing interrupted it.

    With `checks` false, or fewer than 3 seeds, nothing is stopped for being behind. Runs that are there already are
    kept. A setting is stopped too if a run of it cannot go on, or if its losses do not compare with the first run's.
    """
    for share in (*CHECKS, 1.0) if checks and len(tried.seeds) >= FEWEST else (1.0,):
        train_to(tried, settings, share, given, processes, stop, say)
        if stop():
            return False
        if share < 1:
            stop_behind(tried, settings, share, say)
    return True


def train_to(
    tried: Try, settings: Sequence[Setting], share: float, given: frozenset[str], processes: int, stop: Stop, say: Say
) -> None:
    """Train the runs of `settings` to a share of their steps, unless their only evaluation within it is at step 0."""
    jobs = {
        Job(config, given, share, tried.seconds, tried.most_steps): (setting, seed)
        for seed in tried.seeds
        for setting in settings
        if setting.name not in tried.stopped and step_at(config := tried.config(setting, seed), share) > 0
    }
    left = [job for job in jobs if not job.is_done]
    trained = train_jobs(left, processes, stop, lambda job: jobs[job][0].name in tried.stopped)
    for number, (job, error) in enumerate(trained, 1):
        setting, seed = jobs[job]
        run = read_run(job.run_dir)
        step = max((row["step"] for row in run.rows), default=0) if run else 0
        why = f"cannot go on: {error}" if error else why_not_comparable(tried, job.run_dir) if run else ""
        if why and setting.name not in tried.stopped and not (error and stop()):
            tried.stopped[setting.name] = {"step": step, "words": why}
            tried.save()
        if not error and not job.is_done:  # interrupted
            continue
        lowest = run.lowest() if run else None
        words = f"step {step:,}, validation loss {lowest['loss']:.4f}" if lowest else f"step {step:,}"
        say(f"{number} of {len(left)}: {setting.name}, seed {seed}: {why or words}")


def why_not_comparable(tried: Try, run_dir: Path) -> str:
    """Return why the losses of a run do not compare with those of the first run of the try; "" if they do."""
    places = (tried.run_dir(setting, seed) for setting in tried.settings for seed in tried.seeds)
    first = next(place for place in places if (place / "config.toml").exists())
    unit, notes = common_unit(recorded.read_run(first), recorded.read_run(run_dir))
    return "" if unit == "loss" else f"not comparable with {first.parent.name}: {notes[0]}"


def stop_behind(tried: Try, settings: Sequence[Setting], share: float, say: Say) -> None:
    """Stop those of `settings` that are clearly behind at `share` of the steps, as the rule of this module says.

    All settings of the try that have come that far and were not stopped are compared, at equal shares of their steps.
    """
    runs = read_runs(tried)
    known = losses_at(tried, runs, share)
    leader, behind = find_behind(known)
    for setting in settings:
        name = setting.name
        if name not in known or tried.judged.get(name, 0) >= share or any(run.is_complete for run in runs[name]):
            continue
        tried.judged[name] = share
        if name in behind and (tried.against == "best" or setting is not tried.settings[0]):
            step = step_at(runs[name][0].config, share)
            words = f"{verdict(behind[name])} than {leader}"
            tried.stopped[name] = {"step": step, "words": words}
            say(f"stopped {name} at step {step:,}: {words}")
    tried.save()


def find_behind(known: Losses) -> tuple[str, dict[str, Difference]]:
    """Return the leader ("" if there is none), and how far those are behind it that are clearly behind it."""
    leader, *others = best_first(known) or [""]
    looks = len(CHECKS) * looks_at_best(len(known))
    differences = holm([paired_difference(known[name], known[leader]) for name in others], looks)
    worse_half = others[(len(known) + 1) // 2 - 1 :]
    found = zip(others, differences, strict=True)
    return leader, {name: apart for name, apart in found if apart.low > 0 and name in worse_half}
