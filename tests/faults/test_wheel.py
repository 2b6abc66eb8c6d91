"""The wheel, in an empty environment away from the checkout: it trains, reports and watches. In `make torture`."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, check_page, flags, words

pytestmark = pytest.mark.skipif(not os.environ.get("LOSSCURVE_TORTURE"), reason="takes minutes: in make torture")


@pytest.fixture(scope="module")
def losscurve(tmp_path_factory):
    """The command `losscurve`, installed from the wheel with what it needs."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = ["-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([sys.executable, *pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT], check=True)
    (wheel,) = folder.glob("losscurve-*.whl")
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
    python = folder / "env" / "bin" / "python"
    wanted = [f"{wheel}[dashboard]", "--constraint", ROOT / "constraints.txt"]
    subprocess.run([python, *pip, "install", *wanted], check=True)
    return folder / "env" / "bin" / "losscurve"


def test_it_trains_reports_and_watches(losscurve, tmp_path):
    (tmp_path / "text.txt").write_text(words(900), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(line: str) -> str:
        done = subprocess.run(
            [losscurve, *line.split()], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "saved run/model.pt" in run(f"train --text text.txt --out_dir run {flags()}")
    run("train --preset shakespeare-char-cpu --text text.txt --max_steps 3 --out_dir preset")
    run("report run --out report.html")
    assert "<svg" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "read back" in run("export run --to html --out model.html")
    assert "losscurve" in run("--version")
    check_page([losscurve, "watch", "run"], tmp_path, environment)
