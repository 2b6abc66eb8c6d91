"""Samples: written, read back, cut, and shown as text."""

import pytest
from conftest import write_samples

from llm.errors import UserError
from llm.record.samples import Sample, Samples, read_samples

FAKE = "words\n\n--- step 4 | val 1.0000 ---\nthat look like a heading"


def test_what_was_written_is_read_back_and_stands_in_the_text(tmp_path):
    assert read_samples(tmp_path) == []
    write_samples(tmp_path, (0, 4.25, FAKE), (4, 3.125, "\u00fcber \U0001f600"), prompt="ROMEO:")
    assert read_samples(tmp_path) == [
        Sample(0, 4.25, "ROMEO:", FAKE),
        Sample(4, 3.125, "ROMEO:", "\u00fcber \U0001f600"),
    ]
    assert (tmp_path / "samples.txt").read_text(encoding="utf-8") == (
        f"--- step 0 | val 4.2500 ---\nROMEO:{FAKE}\n\n--- step 4 | val 3.1250 ---\nROMEO:\u00fcber \U0001f600\n\n"
    )


def test_samples_that_are_cut_leave_both_files(tmp_path):
    write_samples(tmp_path, (0, 4.0, "a"), (4, 3.0, "b"), (8, 2.0, "c"))
    Samples(tmp_path).cut(4)
    assert [sample.text for sample in read_samples(tmp_path)] == ["a", "b"]
    assert "step 8" not in (tmp_path / "samples.txt").read_text(encoding="utf-8")


def test_a_torn_last_line_is_left_out_and_a_damaged_one_named(tmp_path):
    write_samples(tmp_path, (0, 4.0, "a"), (4, 3.0, "b"))
    path = tmp_path / "samples.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert [sample.text for sample in read_samples(tmp_path)] == ["a"]
    for damage in (b'{"step": 1}\n', b"[]\n", b'{"step": 1, "val_loss": 2, "prompt": 3, "text": "x"}\n', b"\xff\n"):
        path.write_bytes(damage + whole)
        with pytest.raises(UserError, match=r"samples\.jsonl: line 1 is damaged"):
            read_samples(tmp_path)


def test_a_process_that_does_not_lead_writes_nothing(tmp_path):
    samples = Samples(tmp_path, writes=False)
    samples.add(step=0, val_loss=1.0, prompt="", text="x")
    samples.catch_up()
    samples.cut(0)
    assert list(tmp_path.iterdir()) == []
