"""The chapter's door to `losscurve prepare`."""

import sys

from llm.commands.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("prepare", sys.argv[1:]))
