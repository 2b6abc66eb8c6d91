"""What a person waits for stays light: asking for help loads none of the large libraries."""

import subprocess
import sys

from llm.commands.main import COMMANDS

HEAVY = {"torch", "numpy", "matplotlib", "tiktoken", "tokenizers", "rich"}


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
