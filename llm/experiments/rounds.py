"""Train the settings of a try in rounds, and stop early what is clearly behind.

The rule, successive halving with a paired test: at a third and at two thirds of the steps, all settings are compared
with the leader, which has the lowest mean validation loss over the seeds. A setting stops if two things hold: Student's
t over the pairs with the same seed calls it worse, at 5 % with Holm's correction for the number of settings, and it is
in the worse half. With fewer than 3 seeds nothing stops early.

Sources: Jamieson and Talwalkar, Non-stochastic best arm identification and hyperparameter optimization (2016), for
successive halving; `paired` for the test.
"""

import statistics
from collections.abc import Callable, Sequence

from llm.errors import UserError
from llm.experiments.jobs import Job, Stop, steps_of, train_jobs
from llm.experiments.paired import FEWEST, holm, looks_at_best, paired_difference, verdict
from llm.experiments.trials import Setting, Try
from llm.record.metrics import best, read_record
from llm.weights import run_config

CHECKS = (1 / 3, 2 / 3)  # shares of the steps

Say = Callable[[str], None]
Losses = dict[str, list[float]]  # of each setting: the lowest validation loss of each seed, nats per token


def train_settings(
    tried: Try, settings: Sequence[Setting], given: frozenset[str], processes: int, stop: Stop, say: Say, checks: bool
) -> bool:
    """Train `settings` with all seeds, and stop those that are clearly behind; return whether nothing interrupted it.

    With `checks` false, or fewer than 3 seeds, nothing is stopped early. Runs that are there already are kept. A
    setting whose run cannot go on is stopped too.
    """
    shares = (*CHECKS, 1.0) if checks and len(tried.seeds) >= FEWEST else (1.0,)
    for share in shares:
        alive = [setting for setting in settings if setting.name not in tried.stopped]
        jobs = {
            Job(tried.config(setting, seed), given, share, tried.seconds, tried.most_steps): (setting, seed)
            for seed in tried.seeds
            for setting in alive
        }
        left = [job for job in jobs if not job.is_done]
        for number, (job, error) in enumerate(train_jobs(left, processes, stop), 1):
            setting, seed = jobs[job]
            if error and not stop():
                tried.stopped[setting.name] = {"step": last_step(job), "words": f"cannot go on: {error}"}
                tried.save()
            if not error and not job.is_done:  # interrupted
                continue
            words = error or f"step {last_step(job):,}, validation loss {loss_until(tried, setting, seed, 1):.4f}"
            say(f"{number} of {len(left)}: {setting.name}, seed {seed}: {words}")
        if stop():
            return False
        if share < 1:
            stop_behind(tried, settings, share, say)
    return True


def last_step(job: Job) -> int:
    """Return the last recorded step of a run, 0 if it has no record."""
    try:
        return max((row["step"] for row in read_record(job.run_dir)), default=0)
    except UserError:
        return 0


def loss_until(tried: Try, setting: Setting, seed: int, share: float) -> float:
    """Return the lowest validation loss of a run within `share` of its steps; infinity if it has none."""
    run_dir = tried.run_dir(setting, seed)
    limit = steps_of(run_config(run_dir), share)
    lowest = best([row for row in read_record(run_dir) if row["step"] <= limit])
    return float(lowest["loss"]) if lowest else float("inf")


def stop_behind(tried: Try, settings: Sequence[Setting], share: float, say: Say) -> None:
    """Stop those of `settings` that are clearly behind at `share` of the steps, as the rule of this module says.

    The leader is the best of all settings of the try that have come that far and were not stopped.
    """
    known = {name: found for name, found in losses_at(tried, share).items() if name not in tried.stopped}
    if len(known) < 2:
        return
    leader = min(known, key=lambda name: statistics.fmean(known[name]))
    others = [name for name in known if name != leader and (tried.against == "best" or name != tried.settings[0].name)]
    differences = holm([paired_difference(known[name], known[leader]) for name in others], looks_at_best(len(known)))
    behind = {name: found for name, found in zip(others, differences, strict=True) if found.low > 0}
    worst = sorted(known, key=lambda name: statistics.fmean(known[name]))[(len(known) + 1) // 2 :]
    for setting in settings:
        if setting.name in behind and setting.name in worst:
            step = steps_of(run_config(tried.run_dir(setting, tried.seeds[0])), share)
            words = f"{verdict(behind[setting.name])} than {leader}"
            tried.stopped[setting.name] = {"step": step, "words": words}
            say(f"stopped {setting.name} at step {step:,}: {words}")
    tried.save()


def losses_at(tried: Try, share: float) -> Losses:
    """Return the losses of each setting within `share` of its steps, if all its seeds came that far."""
    found: Losses = {}
    for setting in tried.settings:
        jobs = [Job(tried.config(setting, seed), frozenset(), share) for seed in tried.seeds]
        if not all(job.is_done for job in jobs):
            continue
        losses = [loss_until(tried, setting, seed, share) for seed in tried.seeds]
        if max(losses) < float("inf"):
            found[setting.name] = losses
    return found
