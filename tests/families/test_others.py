"""Families that emkd was not written for: if they meet the conditions they work unchanged, otherwise they are refused
with the reason, as teacher and as student."""

import pytest

from emkd.cli import main
from emkd.errors import ModelError
from emkd.storage.cache import Cache
from emkd.vlm import load
from tests import families, tiny
from tests.families import others
from tests.families.naive import ROWS, STUDENT, TEACHER, check_losses

# PaliGemma's processor raises it with NumPy 2, and a warning is an error here.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.slow
@pytest.mark.parametrize("name", others.WORK)
def test_it_works_without_being_named(name, data, tmp_path):
    """The losses from the cache equal the losses with both models in memory."""
    build = others.WORK[name]
    teacher = others.save(build, tmp_path / "teacher", **TEACHER)
    student = others.save(build, tmp_path / "student", **STUDENT)
    cache = Cache.open(tiny.make_cache(teacher, data, tmp_path / "cache"))
    assert (len(cache), cache.skipped.num_rows) == (len(ROWS), 0), cache.skipped.to_pylist()
    check_losses(load(str(student)), cache, data, load(str(teacher)), name)


@pytest.mark.parametrize("name", others.REFUSED)
def test_a_teacher_that_does_not_keep_to_it_is_refused(name, data, tmp_path):
    build, reason = others.REFUSED[name]
    teacher = others.save(build, tmp_path / "teacher", **TEACHER)
    with pytest.raises(ModelError, match=reason):
        tiny.make_cache(teacher, data, tmp_path / "cache")


@pytest.mark.parametrize("name", others.REFUSED)
def test_so_is_a_student(name, data, tmp_path, capfd):
    build, reason = others.REFUSED[name]
    teacher = families.save("llava", tmp_path / "teacher", **TEACHER)
    student = others.save(build, tmp_path / "student", **STUDENT)
    cache = tiny.make_cache(teacher, data, tmp_path / "cache")
    arguments = ["--student", student, "--data", data, "--cache", cache, "--output", tmp_path / "out"]
    with pytest.raises(SystemExit) as left:
        main(["train-student", *map(str, arguments)])
    assert left.value.code == 1
    error = capfd.readouterr().err
    assert reason in error
    assert "Traceback" not in error
