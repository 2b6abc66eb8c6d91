"""Shell commands that convert a file into UTF-8 text, for messages.

The commands are filters: `iconv … < a.txt > a.utf8.txt`. So they serve files, compressed files and streams alike, and
never overwrite the file that they read.

`shell_name` is the name by which a shell finds a file, "" for a stream.
"""

import shlex
from pathlib import Path

DECOMPRESSORS = {".gz": "gzip -dc", ".zst": "zstd -dc"}  # for files that are read decompressed


COMPRESSED_SUFFIXES = (*DECOMPRESSORS, ".xz", ".bz2", ".lz4")


KEPT_SUFFIXES = (".txt", ".md", ".jsonl", ".ndjson")  # a converted file keeps these


ARCHIVE_SUFFIXES = (".tgz", ".txz", ".tbz", ".tar.gz", ".tar.xz", ".tar.bz2", ".tar.zst")


def conversion_command(filter_command: str, shell_name: str, suffix: str = ".txt") -> str:
    """Return the shell command that converts a file into text by a filter, or the pipe that converts a stream.

    `suffix` is that of the new file, where `converted_name` does not keep another.
    """
    if not shell_name:
        return f"… | {filter_command} | losscurve …"
    source = shlex.quote(shell_name)
    target = shlex.quote(converted_name(shell_name, suffix))
    decompressor = DECOMPRESSORS.get(Path(shell_name).suffix.lower())
    if decompressor:
        return f"{decompressor} < {source} | {filter_command} > {target}"
    return f"{filter_command} < {source} > {target}"


def converted_name(name: str, suffix: str = ".txt") -> str:
    """Return the name of the file that `conversion_command` writes: a.utf8.txt for a.txt, a.txt.gz or a.pdf."""
    path = Path(name)
    while path.suffix.lower() in COMPRESSED_SUFFIXES:
        path = path.with_suffix("")
    suffix = path.suffix if path.suffix.lower() in KEPT_SUFFIXES else suffix
    return str(path.with_name(f"{path.stem}.utf8{suffix}"))


def quote_name(name: str) -> str:
    """Quote a file name for a shell, so that no command takes it for a flag."""
    return shlex.quote(f"./{name}" if name.startswith("-") else name)


def fill_remedy(remedy: str, shell_name: str) -> str:
    """Return a remedy for the file `shell_name`: a filter after "| ", or words with {file}, {folder} and {text}."""
    if remedy.startswith("| "):
        return "convert it: " + conversion_command(remedy.removeprefix("| "), shell_name)
    if not shell_name:
        return remedy.format(file="FILE", folder="FOLDER", text="TEXT")
    path = Path(shell_name)
    folder = path.with_name(path.name.split(".")[0] + "-unpacked")
    return remedy.format(
        file=quote_name(shell_name),
        folder=quote_name(str(folder)),
        text=quote_name(converted_name(shell_name)),
    )
