"""`python -m llm COMMAND`."""

import sys

from llm.machine.interpreter import put_working_folder_last

put_working_folder_last()
from llm.commands.main import main  # noqa: E402

sys.exit(main())
