"""The fuzzer finds nothing: see fuzz.py. Part of `make torture`, which installs atheris where it can be had."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.skipif(not os.environ.get("LOSSCURVE_TORTURE"), reason="part of make torture")
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
@pytest.mark.parametrize("parser", ["settings", "record", "tokens", "description", "manifest", "state"])
def test_no_input_breaks_a_parser(tmp_path, parser, record_property):
    words = [sys.executable, "-m", "tests.faults.fuzz", parser, "-max_total_time=15"]
    shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stdout[-2000:] + shown.stderr[-2000:]
    tried = int(shown.stderr.split("Done ")[1].split()[0])
    record_property("inputs made up by the fuzzer", tried)
