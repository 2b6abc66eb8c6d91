"""The chapter's door to `losscurve sample`."""

import sys

from llm.commands.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("sample", sys.argv[1:]))
