"""The chapter's door to `losscurve train`."""

import sys

from llm.commands.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("train", sys.argv[1:]))
