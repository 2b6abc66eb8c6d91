"""Where this Python, and those that we start, look for modules: a person's files must not stand in for them.

`python -m` puts the working folder first on `sys.path`. A file `random.py` there is then what `import random` finds, in
our modules, in PyTorch and in Python's own.
"""

import os
import sys
import sysconfig
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])  # the folder that `llm` was imported from


def put_working_folder_last() -> None:
    """Undo what `python -m` did to `sys.path`. Call it in the main module, before the rest is imported.

    The folder stays on the path, since `llm` may have been found there.
    """
    if not sys.flags.safe_path:
        sys.path.append(sys.path.pop(0))


def child_environment() -> dict[str, str]:
    """Return the environment for a Python that we start: it finds modules where this one does, so also in the caller's
    PYTHONPATH, and does not look into the working folder first.
    """
    found = [path for path in sys.path if path]  # "" is the working folder
    if ROOT not in found:
        found.insert(0, ROOT)
    given = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    found = [path for path in given if path not in found] + found  # set since this Python started
    return os.environ | {"PYTHONPATH": os.pathsep.join(found), "PYTHONSAFEPATH": "1"}


def stand_in() -> str:
    """Name a person's file that was imported in place of a module of Python's own; "" if there is none.

    For an error that nothing else explains.
    """
    library = tuple(os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "platstdlib"))
    for name in sorted(sys.stdlib_module_names & sys.modules.keys()):
        for path in sys.path:
            places = (os.path.join(path, f"{name}.py"), os.path.join(path, name, "__init__.py"))
            file = getattr(sys.modules[name], "__file__", None)
            if file in places and not file.startswith(library):
                return f"your {file} stands in for Python's own {name}; rename it, or take its folder off PYTHONPATH"
    return ""
