"""Run `losscurve prepare`, by the command that the chapter names: `python -m scripts.prepare`."""

import sys

from llm.commands.main import run_command
from llm.machine.interpreter import put_working_folder_last

if __name__ == "__main__":
    put_working_folder_last()
    sys.exit(run_command("prepare", sys.argv[1:]))
