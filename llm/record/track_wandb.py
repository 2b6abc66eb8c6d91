"""Show a run in Weights & Biases (W&B): online if the user has an account there, else offline."""

import hashlib
import html
import json
import netrc
import os
import shlex
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llm.config import TrainConfig
from llm.errors import UserError
from llm.record.tracker import Say, Start, hyperparameters, scalars
from llm.storage.lines import Row


def with_wandb(say: Say) -> Start:
    """Return the W&B tracker, which keeps a run of the same name in the run's wandb/.

    It is online only if the user has set W&B up. Otherwise the run is written offline: nothing is sent, and nobody is
    asked for a key.

    Raises:
        ImportError: W&B is not installed.
        UserError: W&B was asked to be online and has no key, or there is no home folder.
    """
    if os.path.expanduser("~") == "~":  # W&B looks for its settings there
        raise UserError("HOME is not set, and W&B needs a home folder for its settings; set it, such as HOME=/tmp")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # W&B's own crash reports
    import wandb

    settings = wandb.setup().settings
    mode = _choose_mode(settings, say)

    class WandB:
        def __init__(self, run_dir: Path, config: TrainConfig, first: Row) -> None:
            name = run_dir.resolve().name
            run_id = _run_id(name, first)
            for old in (run_dir / "wandb").glob(f"*run-*-{run_id}"):
                shutil.rmtree(old)
            self._run = wandb.init(
                dir=str(run_dir),
                id=run_id,
                project=settings.project or "losscurve",
                name=settings.run_name or name,
                config=hyperparameters(config),
                mode=mode,
                settings=wandb.Settings(silent=True, console="off", login_timeout=1.0),  # in case it asks nevertheless
            )
            self._run.define_metric("loss/val", summary="min")
            self._step = 0
            if mode == "offline":
                self.where = f"offline; to send it: wandb sync {shlex.quote(str(Path(self._run.dir).parent))}"
            else:
                self.where = self._run.url or f"nothing is kept ({mode})"

        def row(self, row: Row) -> None:
            self._step = row["step"]
            self._run.log(scalars(row), step=self._step)

        def sample(self, step: int, text: str) -> None:
            page = f"<p>step {step}</p><pre>{html.escape(text)}</pre>"
            # not `step`: W&B drops what is logged for an earlier step
            self._run.log({"sample": wandb.Html(page, inject=False)}, step=self._step)

        def flush(self) -> None: ...  # W&B uploads on its own schedule

        def close(self) -> None:
            self._run.finish()

    return WandB


def _choose_mode(settings: Any, say: Say) -> Any:
    """Return W&B's mode; "offline" in place of "online" if it has no key and the user did not ask for "online".

    Raises:
        UserError: WANDB_MODE asks for online mode, and there is no key.
    """
    mode = {"dryrun": "offline", "run": "online"}.get(settings.mode, settings.mode)
    if mode != "online" or has_key(settings):
        return mode
    if "WANDB_MODE" in os.environ:
        raise UserError("WANDB_MODE = online: W&B has no key here; run wandb login, or set WANDB_MODE=offline")
    say("W&B has no key here, so this run is written offline and nothing is sent; run wandb login to be online")
    return "offline"


def _run_id(name: str, first: Row) -> str:
    """Return the same id for as long as this run is the same run, so that a view replaces the earlier one.

    The seconds of the first evaluation distinguish it from other runs in the same folder.
    """
    return hashlib.sha256(json.dumps([name, first], sort_keys=True).encode()).hexdigest()[:16]


def has_key(settings: Any) -> bool:
    """Return whether W&B with these settings has a key, by looking where W&B itself looks, without asking."""
    if settings.api_key or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    own = os.environ.get("NETRC")
    places = [own] if own else [os.path.expanduser("~/.netrc"), os.path.expanduser("~/_netrc")]
    try:
        known = netrc.netrc(next(place for place in places if os.path.isfile(place)))
    except (StopIteration, OSError, netrc.NetrcParseError):
        return False
    return known.authenticators(urlsplit(settings.base_url).netloc) is not None
