"""What a person waits for stays light: asking for help loads none of the large libraries."""

import subprocess
import sys

import pytest
from conftest import environment, flags

from llm.commands.main import COMMANDS

HEAVY = {"torch", "numpy", "matplotlib", "tiktoken", "tokenizers", "rich"}
UNASKED = {"torch._dynamo", "wandb", "tensorboard", "torch.utils.tensorboard"}


def test_importing_the_package_or_asking_for_help_loads_no_torch():
    for command in COMMANDS:
        code = (
            "import sys, contextlib, io\n"
            "import llm, llm.config\n"
            "from llm.commands.main import main\n"
            "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
            f"    main(['{command}', '--help'])\n"
            f"print(sorted(set(sys.modules) & {HEAVY!r}))"
        )
        shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert shown.stdout.strip() == "[]", command


def test_the_page_loads_no_torch():
    """It stands beside a training, in a process of its own."""
    pytest.importorskip("uvicorn")
    code = "import sys, llm.page.server; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert shown.stdout == "False\n"


def test_training_reading_weights_and_sampling_load_no_compiler_and_no_tracker(here):
    """`torch._dynamo` takes a second to import, and only `--compile` needs it; a tracker is only for `--track`."""
    train = f"train --text text.txt {flags(max_steps=2, warmup_steps=0)}"
    lines = [f"{train} --optimizer {optimizer} --out_dir {optimizer}" for optimizer in ("adamw", "muon")]
    lines += ["sample --out_dir muon --max_new_tokens 2", "report adamw"]
    code = (
        "import sys; from llm.commands.main import main; "
        f"print([main(line.split()) for line in {lines}], sorted({UNASKED} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert shown.stdout.splitlines()[-1] == "[0, 0, 0, 0] []", shown.stdout
