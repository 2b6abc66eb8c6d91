"""Durable writes that several tests of storage perform: one file, several together, a folder."""

from llm import storage

OLD = {"a.txt": b"old a", "b.txt": b"old b", "c.txt": b"stays"}
NEW = {"a.txt": b"new", "b.txt": b"b new and longer"}


def fill(folder, content=OLD):
    folder.mkdir()
    for name, text in content.items():
        (folder / name).write_bytes(text)


def read_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def write_one(folder):
    storage.write_bytes(folder / "a.txt", b"new")


def write_record(folder):
    storage.write_json(folder / "a.txt", {"new": 1})


def write_several(folder):
    with storage.transaction(folder) as staging:
        for name, text in NEW.items():
            storage.write_bytes(staging / name, text)


def write_folder(folder):
    with storage.folder_in_place(folder / "state") as new:
        for name, text in NEW.items():
            storage.write_bytes(new / name, text)
