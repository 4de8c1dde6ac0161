import json
import os

import pytest

from emkd.errors import DamagedCheckpointError
from emkd.trainer.loop.checkpoints import COMPLETE_NAME, check, checkpoints, complete, last_complete, rotate, step_of


def make(output, step, *, whole=True):
    folder = output / f"checkpoint-{step}"
    (folder / "inner").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights" * step)
    (folder / "inner" / "more.json").write_text("{}")
    if whole:
        complete(folder)
    return folder


def test_the_newest_complete_one_counts(tmp_path):
    said = []
    for step in (2, 10, 9):
        make(tmp_path, step)
    make(tmp_path, 12, whole=False)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete(tmp_path, said.append) == tmp_path / "checkpoint-10"
    assert len(said) == 1
    assert "checkpoint-12 is incomplete, because the run ended while it was saved: ignoring it" in said[0]
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (2, 9, 10, 12)]


def test_none_is_complete(tmp_path):
    make(tmp_path, 1, whole=False)
    assert last_complete(tmp_path, lambda line: None) is None
    assert last_complete(tmp_path / "nowhere", print) is None


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "inner/more.json", COMPLETE_NAME])
@pytest.mark.parametrize("harm", [flip, os.remove, lambda path: os.truncate(path, 1)])
def test_damage_is_an_error_that_names_the_file(tmp_path, name, harm):
    make(tmp_path, 3)
    folder = make(tmp_path, 5)
    check(folder)
    harm(folder / name)
    if name == COMPLETE_NAME and harm is os.remove:
        assert last_complete(tmp_path, lambda line: None) == tmp_path / "checkpoint-3"
        return
    with pytest.raises(
        DamagedCheckpointError, match=f"{name}.*Remove .*checkpoint-5 to resume from the checkpoint before"
    ):
        last_complete(tmp_path, print)


def test_completing_twice_and_after_a_kill(tmp_path):
    """A kill while complete.json was written leaves its partial file, which is not part of the checkpoint."""
    folder = make(tmp_path, 4, whole=False)
    (folder / f".{COMPLETE_NAME}.partial").write_text("half")
    complete(folder)
    complete(folder)
    check(folder)
    assert set(json.loads((folder / COMPLETE_NAME).read_text())["body"]["files"]) == {
        "model.safetensors",
        "inner/more.json",
    }


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [2, 4, 6, 8, 9]), (1, None, [8, 9]), (2, None, [6, 8, 9]), (3, None, [4, 6, 8, 9]),
        (1, 2, [2, 8, 9]), (2, 2, [2, 8, 9]), (3, 2, [2, 6, 8, 9]), (3, 8, [4, 6, 8, 9]),
    ],
)  # fmt: skip
def test_rotation_is_by_step_whatever_the_clock_says(tmp_path, limit, best, left):
    """The oldest has a time in the future, as after a copy from another machine; 9 was left by a killed save."""
    folders = {step: tmp_path / f"checkpoint-{step}" for step in (2, 4, 6, 8, 9)}
    for step, folder in folders.items():
        folder.mkdir()
        if step != 9:
            (folder / "complete.json").touch()
        os.utime(folder, (2e9 - 1e6 * step,) * 2)
    rotate(tmp_path, limit, folders[8], None if best is None else folders[best])
    assert [step_of(path) for path in checkpoints(tmp_path)] == left


def test_an_incomplete_folder_is_no_checkpoint_that_counts(tmp_path):
    for step in (2, 3, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step != 3:
            (tmp_path / f"checkpoint-{step}" / "complete.json").touch()
    rotate(tmp_path, 2, tmp_path / "checkpoint-4", None)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [2, 4]
