"""Imports run one way, and what a person waits for stays light."""

import ast
import subprocess
import sys
from pathlib import Path

from llm.commands.main import COMMANDS

LIBRARY = Path(__file__).parent.parent / "llm"
LAST = (
    *("plan", "scale", "chart", "report", "report_page", "report_markdown", "doctor", "runs", "trackers"),
    "rehearse",
)
ORDER = (
    *(
        "errors",
        "interpreter",
        "recognise",
        "other_names",
        "config",
        "storage",
        "download",
        "cut",
        "tokenizer",
        "compressed",
        "rows",
        "hub",
        "folders",
        "oddities",
        "corpus",
        "foreign",
        "tokens",
        "data",
        "run_data",
        "workers",
        "journal",
        "shards",
        "prepare",
        "kernel",
        "loss",
        "model",
    ),
    *(
        "schedule",
        "optim",
        "device",
        "distributed",
        "checkpoint",
        "metrics",
        "evaluate",
        "generate",
        "parallel",
        "bands",
        "plot",
        "explain",
        "state",
        "saver",
        "refused",
        "samples",
        "train",
        "weights",
        "start",
        "run",
        "memorised",
        "verify",
        "prove",
    ),
    *LAST,
)
# what plugs in from outside: nothing in the library imports it
OUTSIDE = {"explain", *LAST}
READING_PATH = ("model", "loss", "data", "schedule", "optim", "train")


def imported(path: Path) -> set[str]:
    """The modules of ours that a file imports, by their last name; `from llm import x` counts as x."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "llm":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("llm.")}
    return found - {"__version__"}


def test_a_file_imports_only_from_those_above_it():
    files = {path.stem for path in LIBRARY.glob("*.py")} - {"__init__", "__main__"}
    assert files == set(ORDER)
    for position, name in enumerate(ORDER):
        outside = set() if name in OUTSIDE else OUTSIDE
        assert imported(LIBRARY / f"{name}.py") <= set(ORDER[:position]) - outside, name


def test_the_page_and_the_commands_plug_in_from_outside():
    for path in LIBRARY.glob("*.py"):
        if path.stem != "__main__":
            assert not imported(path) & {"page", "commands"}, path
    for path in (LIBRARY / "page").glob("*.py"):
        assert "commands" not in imported(path), path


def test_the_model_fits_in_200_lines_and_the_reading_path_in_1000():
    lines = {name: len((LIBRARY / f"{name}.py").read_text(encoding="utf-8").splitlines()) for name in READING_PATH}
    assert lines["model"] < 200
    assert sum(lines.values()) < 1000


def test_importing_the_package_or_asking_for_help_loads_no_torch():
    heavy = {"torch", "numpy", "matplotlib", "tiktoken", "tokenizers", "rich"}
    for command in COMMANDS:
        code = (
            "import sys, contextlib, io\n"
            "import llm, llm.config\n"
            "from llm.commands.main import main\n"
            "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
            f"    main(['{command}', '--help'])\n"
            f"print(sorted(set(sys.modules) & {heavy!r}))"
        )
        shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert shown.stdout.strip() == "[]", command
