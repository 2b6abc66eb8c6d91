"""The files below a folder that are read or left out, both reported: runs, tokens, environments, links, no access."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import flags, words

from llm.errors import UserError
from llm.report import write_markdown
from llm.text import folders
from llm.text.corpus import opened


def made(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(f"text of {name}\n", encoding="utf-8")


def read(folder: str) -> tuple[list[str], list[str]]:
    """Return the texts below a folder, and the lines that report them."""
    notices: list[str] = []
    with opened((folder,), say=notices.append) as source:
        return [file.label for file in source.files], notices


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_second_preparation_leaves_out_what_the_first_run_wrote(place, losscurve):
    """A run and token files; there is an environment too."""
    made(
        "venv/pyvenv.cfg", "venv/lib/site-packages/a/LICENSE.txt", "node_modules/b/README.md", "x.egg-info/SOURCES.txt"
    )
    made("more/b.md")
    Path("text.txt").write_text(words(900), encoding="utf-8")
    settings = flags(max_steps=2, eval_every=2, warmup_steps=0)
    left = "left out: node_modules/ (installed packages), venv/ (an environment), x.egg-info/ (installed packages)"
    code, _, err = losscurve(f"train --text . {settings} --data_dir tokens/first")
    assert code == 0, err
    assert err.count(f"note: .: reading 2 texts: more/b.md, text.txt; {left}\n") == 1
    made("tokens/first/notes.txt")
    code, _, err = losscurve("prepare . --tokenizer byte --data_dir second")
    assert code == 0, err
    assert [line for line in err.splitlines() if line.startswith("note: .: ")] == [
        "note: .: reading 2 texts: more/b.md, text.txt; left out: checkpoints/ (a run), "
        "node_modules/ (installed packages), tokens/first/notes.txt (beside token files) and 2 more"
    ]
    first, second = (json.loads(Path(f"{name}/meta.json").read_text())["source"] for name in ("tokens/first", "second"))
    assert first["sha256"] == second["sha256"]


def test_what_is_left_out_has_its_reason(place):
    made("runs/a/config.toml", "runs/a/metrics.jsonl", "runs/a/samples.txt", "runs/a/deep/own.txt", "runs/notes.txt")
    made("data/train.bin", "data/readme.md", "data/books/one.txt", "shards/train-00000.bin", "shards/input.txt")
    made("conda/conda-meta/x", "conda/share/doc.txt", "src/__pycache__/a.txt", "a.txt", "config.toml")
    Path("r.md").write_text(write_markdown.MARK + "# run\n", encoding="utf-8")
    found = folders.search(Path())
    assert [str(path) for path in found.texts] == ["a.txt", "data/books/one.txt", "runs/notes.txt"]
    assert sorted(found.left_out) == [
        "conda/ (an environment)",
        "data/readme.md (beside token files)",
        "r.md (a report)",
        "runs/a/ (a run)",
        "shards/input.txt (beside token files)",
        "src/__pycache__/ (installed packages)",
    ]
    assert write_markdown.MARK.encode() == folders.REPORT


def test_a_folder_that_is_named_itself_is_read_but_for_the_files_of_a_run(place):
    """The user means its texts: nanoGPT keeps tokens beside them, and a project may be an environment."""
    made(
        "train.bin", "pyvenv.cfg", "config.toml", "metrics.jsonl", "samples.txt", "input.txt", "lib/site-packages/b.txt"
    )
    texts, notices = read(".")
    assert texts == ["input.txt"]
    assert notices == [
        ".: reading 1 text: input.txt; left out: metrics.jsonl (of a run), samples.txt (of a run), "
        "lib/site-packages/ (installed packages)"
    ]
    os.remove("input.txt")
    with pytest.raises(
        UserError, match=r"^\.: no file that ends in .*; left out: metrics\.jsonl \(of a run\), samples"
    ):
        read(".")


def test_the_same_text_converted_or_unpacked_is_read_once(place):
    """So the conversion command of an error message helps in a folder too."""
    made("a.txt", "a.utf8.txt", "b.txt", "b.txt.gz", "c.jsonl.zst", "d.txt.gz")
    os.remove("c.jsonl.zst")
    found = folders.search(Path())
    assert [path.name for path in found.texts] == ["a.utf8.txt", "b.txt", "d.txt.gz"]
    assert found.left_out == ["a.txt (a.utf8.txt is beside it)", "b.txt.gz (b.txt is beside it)"]


def test_linked_folders_are_followed_once(place):
    made("texts/a.txt", "elsewhere/deep/b.txt", "elsewhere/c.md")
    for link, target in (
        ("texts/0-link", "../elsewhere"),
        ("texts/1-again", "../elsewhere/deep"),
        ("elsewhere/loop", "."),
        ("elsewhere/deep/back", "../../texts"),
        ("texts/up", ".."),
    ):
        Path(link).symlink_to(target)
    texts, notices = read("texts")
    assert texts == ["texts/0-link/c.md", "texts/0-link/deep/b.txt", "texts/a.txt"]
    assert notices == [
        "texts: reading 3 texts: 0-link/c.md, 0-link/deep/b.txt, a.txt; left out: up/ (a link to a folder above)"
    ]
    shutil.copytree("elsewhere/deep", "texts/z", symlinks=True)
    Path("texts/0-z").symlink_to("z")
    assert "texts/z/b.txt" in read("texts")[0], "by its own name, though a link comes before it"


def test_dead_links_and_irregular_files_are_named(place):
    made("a.txt")
    for name in ("gone.txt", "gone", ".hidden"):
        Path(name).symlink_to("nowhere")
    Path("self.md").symlink_to("self.md")
    os.mkfifo("pipe.txt")
    assert read(".") == (
        ["a.txt"],
        [".: reading 1 text: a.txt; left out: pipe.txt (not a regular file); dead links: gone, gone.txt, self.md"],
    )
    os.remove("a.txt")
    os.mkfifo("pipe.socket")  # of an ending that no text has: nobody waits for what it says
    with pytest.raises(UserError, match=r"dead links: gone, gone\.txt, self\.md; name the files themselves"):
        read(".")


def test_folders_that_cannot_be_read_are_named(place, monkeypatch):
    made("a.txt", "locked/b.txt", "blind/c.txt")
    scandir, stat = os.scandir, os.stat

    def refusing(path=".", *more):  # as for a user who is not root
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path, *more)

    def without_x(path, **more):
        if str(path).endswith("c.txt"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **more)

    monkeypatch.setattr(os, "scandir", refusing)
    monkeypatch.setattr(os, "stat", without_x)
    assert read(".") == (
        ["a.txt"],
        [
            ".: reading 1 text: a.txt; cannot be read: blind/c.txt (Permission denied), locked (Permission denied)",
        ],
    )
    os.remove("a.txt")
    with pytest.raises(UserError, match=r"^\.: no file .*cannot be read: .*locked \(Permission denied\)"):
        read(".")
    with pytest.raises(UserError, match=r"^locked: no file .*cannot be read: locked \(Permission denied\)"):
        read("locked")


def test_of_many_files_the_first_are_named(place):
    made(*(f"{n:02}.txt" for n in range(12)))
    assert read(".")[1] == [".: reading 12 texts: 00.txt, 01.txt, 02.txt and 9 more"]


def test_a_folder_of_other_files_says_how_to_read_them(place):
    made("a b/one.py", "a b/x/two.py", "a b/x/three.c", "a b/README.md")
    (place / "a b" / "picture.png").write_bytes(b"\x89PNG\0\xff")
    command = "find 'a b' -name '*.py' -exec cat {} + > 'a b.py.txt'"
    (line,) = read("a b")[1]
    assert line == f"a b: reading 1 text: README.md; not read: 2 .py; to read them, join them: {command}"
    subprocess.run(command, shell=True, check=True)
    joined = Path("a b.py.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(joined) == ["text of a b/one.py", "text of a b/x/two.py"]
    made("a b/c.txt")
    assert "not read" not in read("a b")[1][0]  # no more than the texts
    os.remove("a b/c.txt")
    os.remove("a b/README.md")
    with pytest.raises(UserError, match=r"name the files themselves; not read: 2 \.py; to read them, join them: find"):
        read("a b")
