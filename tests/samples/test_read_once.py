"""A row is read from its file once and parsed once, for every caller and for every kind of bad row."""

from collections import Counter

import pytest

from emkd.pipeline.capture import CaptureSettings, Teacher
from emkd.samples import Dataset
from emkd.samples import conversation as conversation_module
from emkd.samples.encode import Encoder
from emkd.samples.sources import ParquetSource
from emkd.storage.cache import Cache
from emkd.trainer.data.samples import EvaluationSamples, Skipped, StudentSamples, TeacherLimits
from emkd.vlm.loading import load
from tests import tiny

N = 6  # rows of tiny.rows()


@pytest.fixture
def counts(monkeypatch):
    """Reads and parses of each row, the parses by the text of its first turn."""
    found = {"reads": Counter(), "parses": Counter()}
    read, parse = ParquetSource.row, conversation_module._parse_turn

    def counted_read(self, index):
        found["reads"][index] += 1
        return read(self, index)

    def counted_parse(number, message, places):
        if number == 0:
            found["parses"][str(message)] += 1
        return parse(number, message, places)

    monkeypatch.setattr(ParquetSource, "row", counted_read)
    monkeypatch.setattr(conversation_module, "_parse_turn", counted_parse)
    return found


def distinct_rows():
    """Each row's first turn is its own, so that parses can be distinguished."""
    rows = tiny.rows()
    for number, row in enumerate(rows):
        row["messages"][0] = {**row["messages"][0], "content": row["messages"][0]["content"] + " what" * number}
    return rows


def check(counts, n_parsed=N):
    assert counts["reads"] == dict.fromkeys(range(N), 1)
    assert sorted(counts["parses"].values()) == [1] * n_parsed


@pytest.fixture
def teacher(teacher_path):
    settings = CaptureSettings(top_k=4, answer_top_k=4, logits_precision="float32", batch_tokens=64, max_length=None)
    return Teacher(load(str(teacher_path)), settings)


def test_the_teacher_reads_each_row_once(teacher, tmp_path, counts):
    dataset = Dataset(str(tiny.write_data(tmp_path / "rows.parquet", distinct_rows())))
    captured = teacher.capture(dataset, range(N))
    assert all(row.record is not None for row in captured)
    check(counts)


def test_bad_rows_are_read_once_too(teacher, tmp_path, counts):
    """One without a conversation, one of a strange role, one whose image does not decode; what each is known by."""
    rows = distinct_rows()
    rows[1]["messages"] = []
    rows[2]["messages"][0]["role"] = "wizard"
    rows[3]["images"] = [b"broken"]
    dataset = Dataset(str(tiny.write_data(tmp_path / "rows.parquet", rows)))
    captured = teacher.capture(dataset, range(N))
    check(counts, n_parsed=N - 1)  # there is no turn to parse in row 1
    texts = list(dataset.text_hashes())
    assert [row.text_sha256 for row in captured] == texts
    assert [row.hint.id for row in captured] == [row["id"] or "" for row in rows]
    skipped = [(row.hint.row, row.reason, row.key != "", row.text_sha256 != "") for row in captured if not row.record]
    assert skipped == [
        (1, "no-messages", False, False), (2, "bad-role", False, False), (3, "image-broken", True, True),
    ]  # fmt: skip


def test_the_student_reads_each_row_once(student_path, teacher_path, tmp_path, counts):
    data = tiny.write_data(tmp_path / "rows.parquet", distinct_rows())
    cache = Cache.open(tiny.make_cache(teacher_path, data, tmp_path / "cache"))
    student = load(str(student_path))
    encoder = Encoder(student.processor, student.image_token_id)
    limits = TeacherLimits(vocabulary=cache.manifest.vocabulary_size, n_student_tokens=student.n_tokens)
    samples = StudentSamples(Dataset(str(data)), encoder, range(N), cache, limits)
    for count in counts.values():
        count.clear()
    assert not any(isinstance(samples[element], Skipped) for element in range(N))
    check(counts)
    for count in counts.values():
        count.clear()
    evaluated = EvaluationSamples(Dataset(str(data)), encoder)
    assert not any(isinstance(evaluated[row], Skipped) for row in range(N))
    check(counts)
