import pytest

from emkd.errors import UsageError
from emkd.pipeline import JobSettings


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"precision": "int4"}, "--precision 'int4': expected one of bfloat16, float16, float32"),
        ({"affinity_precision": "bfloat16"}, "--affinity-precision 'bfloat16': expected one of int8"),
        ({"dtype": "half"}, "--dtype 'half'"),
        ({"top_k": -1}, "--top-k -1: expected at least 0"),
        ({"workers": 0}, "--workers 0: expected at least 1"),
        ({"limit": 0}, "--limit 0: expected at least 1"),
        ({"max_skipped": 1.5}, "--max-skipped 1.5: expected a share between 0 and 1"),
    ],
)
def test_wrong_values_are_named(chosen, message):
    with pytest.raises(UsageError, match=message):
        JobSettings(teacher="t", data="d", cache="c", **chosen)


def test_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher").mkdir()
    found = JobSettings(teacher="teacher", data="d/*.parquet", cache="c").with_absolute_paths()
    assert (found.teacher, found.data, found.cache) == tuple(str(tmp_path / x) for x in ("teacher", "d/*.parquet", "c"))
    assert JobSettings(teacher="org/model", data="d", cache="c").with_absolute_paths().teacher == "org/model"
