"""The harness is tested too: each way to break the code that a hurried hand might find makes one of its checks fail.

A mutant is the source of a module with one idea changed; the text it changes must be there exactly once.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from llm import storage
from llm.storage import checkpoint, files, filesystem_limits, folders, locks
from tests.faults import checks

Check = Callable[[Path], object]
STORAGE = (files, folders, filesystem_limits, locks)


class Mutant(NamedTuple):
    what: str
    module: ModuleType
    changes: list[tuple[str, str]]
    check: Check


def faults(scenario: checks.Scenario, *kinds: str) -> Check:
    modes = [mode for mode in checks.MODES if mode[0] in (kinds or ("killed",))]
    return lambda place: checks.survives_faults(scenario, place, modes)


def cuts(scenario: checks.Scenario) -> Check:
    return lambda place: checks.survives_power_cuts(scenario, place)


ONE, TWO = checks.SAVES[0], checks.SAVES[1]
BEST = checks.SAVES[2]
FLUSHED = "            sync_file(file)\n        os.replace(temporary, path)\n"
RENAMED = "        rename_folder(staging, folder / READY)\n"
MANIFEST = '        write_json(temporary / "manifest.json", {"files": manifest})\n'
PLACED = "        os.replace(temporary, final)\n"
STATE = "    with storage.folder_in_place(final) as folder:\n"

MUTANTS = [
    # one file
    Mutant("a file is not flushed", storage, [(FLUSHED, "        os.replace(temporary, path)\n")], cuts(checks.FILE)),
    Mutant("what is held back is not written", storage, [("            file.flush()\n", "")], cuts(checks.FILE)),
    Mutant(
        "renamed before it is flushed",
        storage,
        [
            ("            file.flush()\n", "            os.replace(temporary, path)\n            file.flush()\n"),
            (FLUSHED, "            sync_file(file)\n"),
        ],
        cuts(checks.FILE),
    ),
    Mutant(
        "the folder of a file is not flushed",
        storage,
        [("        raise\n    sync_folder(path.parent)\n", "        raise\n")],
        cuts(checks.FILE),
    ),
    Mutant("no folder is flushed", storage, [("        os.fsync(handle)\n", "        pass\n")], cuts(checks.FILE)),
    Mutant(
        "no folder is flushed, and states are saved",
        storage,
        [("        os.fsync(handle)\n", "        pass\n")],
        cuts(ONE),
    ),
    Mutant(
        "the temporary name is the final one",
        storage,
        [('temporary = temporary_path(path, "tmp")', "temporary = path")],
        faults(checks.FILE),
    ),
    Mutant(
        "the old file goes first",
        storage,
        [("        os.replace(temporary, path)\n", "        path.unlink()\n        os.replace(temporary, path)\n")],
        faults(checks.FILE),
    ),
    Mutant(
        "a temporary file stays",
        storage,
        [("        sweep(folder)\n        yield\n", "        yield\n")],
        faults(checks.FILE),
    ),
    # a record that grows
    Mutant(
        "a torn row stays",
        storage,
        [("            os.truncate(path, size_before)\n", "            pass\n")],
        faults(checks.RECORD_GOES_ON, "short"),
    ),
    Mutant(
        "half a row is taken for a whole",
        storage,
        [("if file.write(content) != len(content):", "if not file.write(content):")],
        faults(checks.RECORD, "short"),
    ),
    Mutant(
        "a record is not flushed",
        storage,
        [('    with open(path, "ab") as file:\n        sync_file(file)\n', "")],
        cuts(checks.RECORD_FLUSHED),
    ),
    # a folder with a manifest
    Mutant(
        "files of a folder are not flushed",
        storage,
        [
            (
                "                sync_file(file)\n            manifest[path.name]",
                "                pass\n            manifest[path.name]",
            )
        ],
        cuts(checks.NEW_FOLDER_PLAIN),
    ),
    Mutant(
        "the manifest comes after the name",
        storage,
        [(MANIFEST, ""), (PLACED, PLACED + MANIFEST.replace("temporary /", "final /"))],
        faults(checks.NEW_FOLDER),
    ),
    Mutant(
        "the name of a folder is not flushed",
        storage,
        [("    sync_folder(final.parent)\n    shutil", "    shutil")],
        cuts(checks.NEW_FOLDER),
    ),
    Mutant(
        "the old folder goes first",
        storage,
        [("            _free_name(final, aside)\n", "            shutil.rmtree(final)\n")],
        faults(checks.FOLDER),
    ),
    Mutant(
        "a folder grows under its final name",
        storage,
        [
            (
                "    temporary.mkdir()\n",
                "    temporary = final\n    shutil.rmtree(final, ignore_errors=True)\n    temporary.mkdir()\n",
            ),
            ("        if final.exists():\n            _free_name(final, aside)\n", ""),
        ],
        faults(checks.NEW_FOLDER),
    ),
    Mutant(
        "what was set aside is not put back",
        storage,
        [("            rename_folder(path, final)\n", "            shutil.rmtree(path)\n")],
        faults(checks.FOLDER),
    ),
    # several files
    Mutant(
        "files of a transaction are not flushed",
        storage,
        [("        sync_files(staging)\n", "")],
        cuts(checks.SEVERAL_PLAIN),
    ),
    Mutant(
        "names of a transaction are not flushed",
        storage,
        [("        sync_folder(staging)\n", "")],
        cuts(checks.SEVERAL_PLAIN),
    ),
    Mutant(
        "the point of no return is not flushed",
        storage,
        [("        raise\n    sync_folder(folder)\n    recover(folder)\n", "        raise\n    recover(folder)\n")],
        cuts(checks.SEVERAL),
    ),
    Mutant(
        "there is no point of no return",
        storage,
        [
            (
                RENAMED,
                "        for path in sorted(staging.iterdir()):\n"
                "            os.replace(path, folder / path.name)\n"
                "        staging.rmdir()\n",
            )
        ],
        faults(checks.SEVERAL),
    ),
    Mutant(
        "what was complete is undone",
        storage,
        [
            (
                "        for path in sorted(ready.iterdir()):\n            os.replace(path, folder / path.name)\n",
                "        for path in sorted(ready.iterdir()):\n            path.unlink()\n",
            )
        ],
        faults(checks.SEVERAL),
    ),
    Mutant(
        "what was half done stays",
        storage,
        [("        shutil.rmtree(folder / STAGING)\n", "        pass\n")],
        faults(checks.SEVERAL),
    ),
    # reading, the lock
    Mutant(
        "hashes are not compared",
        storage,
        [(' or sha256(path) != entry.get("sha256")', "")],
        checks.notices_flips,
    ),
    Mutant("links are followed", storage, [("if path.is_symlink() or not", "if not")], checks.refuses_links),
    Mutant(
        "a manifest may be a link",
        storage,
        [('if (folder / "manifest.json").is_symlink():', "if False:")],
        checks.refuses_links,
    ),
    Mutant(
        "the lock is none",
        storage,
        [("        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n", "        pass\n")],
        checks.one_holder,
    ),
    Mutant(
        "the lock is shared",
        storage,
        [("fcntl.LOCK_EX", "fcntl.LOCK_SH")],
        checks.one_holder,
    ),
    # states
    Mutant(
        "old states go before the new one stands",
        checkpoint,
        [
            (
                STATE,
                "    for old in [s for s in saved_steps(run_dir) if s < step][: 1 - keep or None]:\n"
                "        storage.remove_folder(run_dir / folder_name(old))\n" + STATE,
            )
        ],
        faults(ONE),
    ),
    Mutant(
        "a retired state goes file by file",
        storage,
        [
            (
                "    _free_name(folder, temporary)\n    sync_folder(folder.parent)\n    if temporary.exists():\n",
                "    shutil.rmtree(folder)\n    if temporary.exists():\n",
            )
        ],
        faults(ONE),
    ),
    Mutant(
        "the end of a retired state is not flushed",
        storage,
        [
            (
                "    _free_name(folder, temporary)\n    sync_folder(folder.parent)\n",
                "    _free_name(folder, temporary)\n",
            )
        ],
        cuts(ONE),
    ),
    Mutant(
        "an overlay ends the saving",
        storage,
        [("        note(folder, REMOVED_SLOWLY, error)\n", "        raise\n")],
        faults(checks.OVERLAY),
    ),
    Mutant(
        "the best is retired",
        checkpoint,
        [("        if old != best_step:\n", "        if True:\n")],
        faults(BEST),
    ),
    Mutant("one too few is kept", checkpoint, [("[:-keep]", "[: 1 - keep or None]")], faults(TWO)),
    Mutant("one too many is kept", checkpoint, [("[:-keep]", "[: -keep - 1]")], faults(TWO)),
    Mutant(
        "the oldest is loaded",
        checkpoint,
        [("in reversed(saved_steps(run_dir)):", "in saved_steps(run_dir):")],
        faults(TWO),
    ),
    Mutant(
        "a state is not verified",
        checkpoint,
        [("    storage.verify_folder(folder)\n", "")],
        checks.notices_flips,
    ),
    Mutant(
        "damage ends a resume",
        checkpoint,
        [("except (UserError, OSError) as error:", "except OSError as error:")],
        checks.notices_flips,
    ),
    Mutant(
        "a state may have another name",
        checkpoint,
        [('if _NAME.fullmatch(folder.name) and folder.name != folder_name(facts["step"]):', "if False:")],
        checks.refuses_another_name,
    ),
]


def module_of(mutant: Mutant) -> ModuleType:
    """The module that a mutant changes: itself, or the one of the storage room in which its text stands."""
    if mutant.module is not storage:
        return mutant.module
    (found,) = {m for m in STORAGE if all(old in source_of(m) for old, _ in mutant.changes)}
    return found


def source_of(module: ModuleType) -> str:
    return Path(str(module.__file__)).read_text(encoding="utf-8")


def mutated(monkeypatch, module: ModuleType, what: str, changes: list[tuple[str, str]]) -> None:
    """Put the mutant's functions in the place of the module's own, wherever they are imported."""
    source = source_of(module)
    for old, new in changes:
        assert source.count(old) == 1, f"{old!r} is there {source.count(old)} times"
        source = source.replace(old, new)
    other = ModuleType(module.__name__)
    exec(compile(source, f"<{what}>", "exec"), other.__dict__)
    for name, value in vars(other).items():
        if getattr(value, "__module__", None) == module.__name__:  # its own, not what it imports
            for place in (storage, checkpoint, *STORAGE):
                if hasattr(place, name):
                    monkeypatch.setattr(place, name, value)


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.what for mutant in MUTANTS])
def test_a_mutant_is_caught(tmp_path, monkeypatch, mutant, record_property):
    mutated(monkeypatch, module_of(mutant), mutant.what, mutant.changes)
    with pytest.raises(AssertionError):
        mutant.check(tmp_path)
    record_property("mutants of the storage caught", 1)


def test_the_same_checks_pass_where_nothing_is_changed(tmp_path, monkeypatch):
    """One check of each sort, on a copy of the source with nothing changed: it is the change that is caught."""
    for number, module in enumerate((*STORAGE, checkpoint)):
        mutated(monkeypatch, module, "none", [])
        for name, check in {
            "file": faults(checks.FILE, "killed", "ENOSPC"),
            "record": cuts(checks.RECORD_FLUSHED),
            "flips": checks.notices_flips,
            "links": checks.refuses_links,
            "name": checks.refuses_another_name,
            "lock": checks.one_holder,
        }.items():
            place = tmp_path / f"{number}-{name}" / "place"
            place.mkdir(parents=True)
            check(place)
