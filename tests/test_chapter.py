"""The chapter's two scripts with our package and files, unchanged but for their numbers of steps and evaluations.

The scripts stand in the folder that LOSSCURVE_SPEC names (chapter_train.py, chapter_sample.py).
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import needs_gpt2, needs_shakespeare

from llm import GPT, GPTConfig

ROOT = Path(__file__).parent.parent
SPEC = Path(os.environ.get("LOSSCURVE_SPEC", ""))
needs_spec = pytest.mark.skipif(
    not (SPEC / "chapter_train.py").is_file(), reason="the chapter's scripts are not in LOSSCURVE_SPEC"
)


def python(*words: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    shown = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


@needs_spec
@needs_gpt2
@needs_shakespeare
def test_the_chapters_scripts_run_unchanged(here, losscurve):
    code, out, _ = losscurve("prepare shakespeare")
    assert code == 0
    assert "train 301,966, val 36,059" in out
    (here / "scripts").mkdir()
    for ours, theirs in (("train.py", "chapter_train.py"), ("sample.py", "chapter_sample.py")):
        text = (SPEC / theirs).read_text(encoding="utf-8")
        text = text.replace("max_steps = 5000", "max_steps = 2").replace("range(20)", "range(2)")
        (here / "scripts" / ours).write_text(text, encoding="utf-8")
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(Path(os.environ["LOSSCURVE_CACHE"]) / "tiktoken"))
    lines = python("-m", "scripts.train").splitlines()
    assert re.match(r"step +0 \| lr 0\.00000 \| train 10\.8\d* \| val 10\.8\d* \| t ", lines[1])
    assert lines[-1] == "saved checkpoints/model.pt"
    assert python("-m", "scripts.sample").startswith("ROMEO:")
    # and what the chapter's script saved is ours to sample, as ours is the chapter's to load
    code, out, err = losscurve("sample --checkpoint checkpoints/model.pt --max_new_tokens 3")
    assert code == 0, err
    assert out.startswith("ROMEO:")
    GPT(GPTConfig()).load_state_dict(torch.load("checkpoints/model.pt", weights_only=True))
