"""Where this Python, and the ones that it starts, look for modules: a user's file must not shadow a module.

`python -m` puts the working folder first on `sys.path`. If that folder holds a file `random.py`, `import random` finds
it, in our modules, in PyTorch and in Python's standard library.
"""

import os
import sys
import sysconfig
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])  # the folder from which `llm` was imported


def put_working_folder_last() -> None:
    """Move the folder that `python -m` put first on `sys.path` to its end. Call this in the main module, first of all.

    The folder stays on the path, since `llm` may have been found there.
    """
    if not sys.flags.safe_path:
        sys.path.append(sys.path.pop(0))


def child_environment() -> dict[str, str]:
    """Return the environment for a Python that we start.

    It finds modules where this one does, including the caller's PYTHONPATH, and does not search the working folder
    first.
    """
    search_path = [path for path in sys.path if path]  # "" is the working folder
    if ROOT not in search_path:
        search_path.insert(0, ROOT)
    python_path = os.environ.get("PYTHONPATH", "")  # may have changed since this Python started
    given = [os.path.abspath(path) for path in python_path.split(os.pathsep) if path]
    search_path = [path for path in given if path not in search_path] + search_path
    return os.environ | {"PYTHONPATH": os.pathsep.join(search_path), "PYTHONSAFEPATH": "1"}


def stand_in() -> str:
    """Return a message that names a user's file imported in place of a standard-library module, or "".

    For an error that has no other explanation.
    """
    library_folders = tuple(os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "platstdlib"))
    for name in sorted(sys.stdlib_module_names & sys.modules.keys()):
        file = getattr(sys.modules[name], "__file__", None)
        for folder in sys.path:
            shadows = (os.path.join(folder, f"{name}.py"), os.path.join(folder, name, "__init__.py"))
            if file in shadows and not file.startswith(library_folders):
                return f"your {file} shadows Python's own module {name}; rename it, or take its folder off PYTHONPATH"
    return ""
