"""`python -m llm COMMAND`."""

import sys

from llm.commands.main import main

sys.exit(main())
