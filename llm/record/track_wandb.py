"""A run as W&B shows it, offline where no account is set up."""

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
    """Weights & Biases: a run of the same name, in the run's wandb/ and, where the user has set W&B up, online.

    Raises ImportError, and UserError where W&B was asked to be online and has no key. Nothing is sent and nobody
    asked for a key otherwise: the run is written offline.
    """
    if os.path.expanduser("~") == "~":  # W&B looks for its settings there
        raise UserError("HOME is not set, and W&B needs a home folder for its settings; set it, such as HOME=/tmp")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # W&B's own reports of its crashes
    import wandb

    settings = wandb.setup().settings
    mode: Any = {"dryrun": "offline", "run": "online"}.get(settings.mode, settings.mode)
    if mode == "online" and not has_key(settings):
        if "WANDB_MODE" in os.environ:
            raise UserError("WANDB_MODE = online: W&B has no key here; run wandb login, or set WANDB_MODE=offline")
        say("W&B has no key here (wandb login gives it one), so this run is written offline and nothing is sent")
        mode = "offline"

    class WandB:
        def __init__(self, run_dir: Path, config: TrainConfig, first: Row) -> None:
            name = run_dir.resolve().name
            # the same for as long as this run is this run, so that a view takes the place of the one before;
            # the seconds that its first evaluation took are those of no other
            number = hashlib.sha256(json.dumps([name, first], sort_keys=True).encode()).hexdigest()[:16]
            for old in (run_dir / "wandb").glob(f"*run-*-{number}"):
                shutil.rmtree(old)
            self._run = wandb.init(
                dir=str(run_dir),
                id=number,
                project=settings.project or "losscurve",
                name=settings.run_name or name,
                config=hyperparameters(config),
                mode=mode,
                settings=wandb.Settings(silent=True, console="off", login_timeout=1.0),  # should it ask all the same
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
            self._run.log({"sample": wandb.Html(page, inject=False)}, step=self._step)  # W&B takes no step back

        def flush(self) -> None: ...  # W&B does so in its own time

        def close(self) -> None:
            self._run.finish()

    return WandB


def has_key(settings: Any) -> bool:
    """Whether W&B, with these settings, finds something to log in with: where it looks itself, without asking."""
    if settings.api_key or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    own = os.environ.get("NETRC")
    places = [own] if own else [os.path.expanduser("~/.netrc"), os.path.expanduser("~/_netrc")]
    try:
        known = netrc.netrc(next(place for place in places if os.path.isfile(place)))
    except (StopIteration, OSError, netrc.NetrcParseError):
        return False
    return known.authenticators(urlsplit(settings.base_url).netloc) is not None
