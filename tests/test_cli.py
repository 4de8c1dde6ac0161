"""Wrong calls of the command line: one clear message, the right exit code, no traceback. Each in a real process
would take seconds to import; here `main` is called, and its output and exit code are checked."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import yaml

from emkd.cli import LEFT, app, main
from tests import tiny


@pytest.fixture
def call(capfd):
    """(exit code, stdout, stderr) of a call."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return int(left.value.code or 0), out, err

    return run


def train(student, data, output, *more: object) -> list[object]:
    return ["train-student", "--student", student, "--data", data, "--output", output, *more]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cache-teacher"], "Missing option '--teacher'"),
        (["cache-techer"], "No such command 'cache-techer'"),
        (["inspect", "x", "--jsn"], "No such option: --jsn"),
        (["train-student", "--student", "s", "--data", "d", "--output", "o", "--alpha", "much"], "Invalid value for .--alpha.: .*valid"),
        (["cache-teacher", "--teacher", "t", "--data", "d", "--cache", "c", "--dry-run", "--repair"], "--dry-run changes nothing"),
        (["cache-teacher", "--teacher", "t", "--data", "d", "--cache", "c", "--dry-run", "--clean"], "--dry-run changes nothing"),
        (["inspect", "nowhere"], "no cache at .*nowhere.*create one with `emkd cache-teacher`"),
        (["inspect", "s3://bucket/cache"], "local"),
        (["demo", "--seeds", "0"], "Invalid value for .--seeds.: .*greater than or equal to 1"),
    ],
)  # fmt: skip
def test_wrong_flags(call, arguments, message):
    code, out, err = call(*arguments)
    assert code == 2
    assert out == ""
    assert len(err.strip().splitlines()) <= 2
    assert re.search(message, err.replace("\n", " ")), err


def test_missing_files(call, teacher_path, student_path, data_path, cache_path, tmp_path):
    cases = [
        (["cache-teacher", "--teacher", tmp_path, "--data", data_path, "--cache", tmp_path / "c"], "without config.json"),
        (["cache-teacher", "--teacher", teacher_path, "--data", tmp_path / "no", "--cache", tmp_path / "c"], "no data at"),
        (["cache-teacher", "--teacher", teacher_path, "--data", data_path, "--cache", tmp_path / "c", "--precision", "int4"], "Invalid value for .--precision.: .*'int4' is not one of 'bfloat16'"),
        (["cache-teacher", "--teacher", teacher_path, "--data", data_path, "--cache", tmp_path / "c", "--extend"], "no cache at"),
        (["cache-teacher", "--teacher", teacher_path, "--data", data_path, "--cache", tmp_path / "c", "--repair"], "no cache at"),
        (["cache-teacher", "--teacher", teacher_path, "--data", data_path, "--cache", tmp_path / "c", "--for-student", tmp_path / "no"], "no model"),
        (["cache-teacher", "--teacher", teacher_path, "--data", data_path, "--cache", tmp_path / "c", "--dry-run", "--for-student", tmp_path / "no"], "no model"),
        (["cache-teacher", "--teacher", teacher_path, "--data", data_path, "--cache", tmp_path / "c", "--dry-run", "--extend"], "no cache at"),
        (train(student_path, data_path, tmp_path / "o", "--cache", tmp_path / "no"), "no cache at"),
        (train(tmp_path / "no", data_path, tmp_path / "o", "--cache", cache_path), "no model"),
        (train(student_path, data_path, tmp_path / "o", "--cache", cache_path, "--recipe", tmp_path / "no"), "does not exist; expected a YAML file or a name; recipes of emkd: demo"),
        (train(student_path, data_path, tmp_path / "o"), "--cache is missing"),
        (train(student_path, data_path, tmp_path / "o", "--cache", cache_path, "--tail", "fat"), "Invalid value for .--tail.: .*'fat' is not one of 'auto', 'codes'"),
        (train(student_path, data_path, tmp_path / "o", "--cache", cache_path, "--vision-pool", "3"), "--vision-pool 3 does not divide"),
        (train(student_path, data_path, tmp_path / "o", "--cache", cache_path, "--address", "1.2.3.4:6379"), "set their number with --workers"),
    ]  # fmt: skip
    for arguments, message in cases:
        code, out, err = call(*arguments)
        assert (code, out) == (2, ""), err
        assert re.search(message, err), err
        assert not (tmp_path / "o").exists()
        assert not (tmp_path / "c").exists()


def test_places_that_cannot_be_written(call, student_path, teacher_path, data_path, cache_path, tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    job = ["cache-teacher", "--teacher", teacher_path, "--data", data_path, "--gpus-per-worker", 0]
    for arguments in (
        [*job, "--cache", file],
        [*job, "--cache", file / "below"],
        train(student_path, data_path, file, "--cache", cache_path),
        train(student_path, data_path, file / "below", "--cache", cache_path),
    ):
        code, out, err = call(*arguments)
        assert code in (1, 2)
        assert out == ""
        assert "file" in err.splitlines()[-1]
    assert file.read_text() == "x"


def test_folders_in_use(call, student_path, teacher_path, data_path, cache_path, tmp_path):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "mine.txt").write_text("x")
    code, _, err = call(*train(student_path, data_path, tmp_path / "o", "--cache", cache_path))
    assert (code, "exists and is not empty" in err) == (2, True)
    code, _, err = call("demo", "--out", tmp_path / "o")
    assert (code, "exists and is not empty" in err) == (2, True)
    code, _, err = call(
        "cache-teacher", "--teacher", teacher_path, "--data", data_path, "--cache", tmp_path / "o", "--gpus-per-worker", 0
    )  # fmt: skip
    assert (code, "not a cache" in err) == (2, True)
    assert (tmp_path / "o" / "mine.txt").read_text() == "x"


def test_a_student_with_another_tokenizer(call, data_path, cache_path, tmp_path):
    words = list(tiny.VOCABULARY)
    words[10], words[11] = words[11], words[10]
    student = tiny.save_model(tmp_path / "student", seed=3, hidden=24, words=words)
    code, _, err = call(*train(student, data_path, tmp_path / "o", "--cache", cache_path))
    assert code == 2
    assert "id 10: teacher 'picture', student 'and'" in err


def test_a_cache_of_other_data(call, student_path, cache_path, tmp_path):
    rows = tiny.rows()
    rows[3]["images"] = [tiny.png(99)]
    other = tiny.write_data(tmp_path / "other.parquet", rows)
    code, _, err = call(*train(student_path, other, tmp_path / "o", "--cache", cache_path))
    assert code == 2
    assert "row 3 (id 'one')" in err
    assert "is not what the teacher saw" in err
    assert "use the data (and the --image-root) that the cache was made from" in err


def test_a_cache_of_another_teacher_is_not_gone_on_with(call, cache_path, data_path, tmp_path):
    other = tiny.save_model(tmp_path / "other", seed=9, hidden=32)
    code, _, err = call(
        "cache-teacher", "--teacher", other, "--data", data_path, "--cache", cache_path, "--gpus-per-worker", 0
    )  # fmt: skip
    assert code == 2
    assert "teacher.weights_sha256: cache has" in err


def test_damage_is_a_failure_not_a_wrong_call(call, student_path, data_path, cache_path, tmp_path):
    shutil.copytree(cache_path, tmp_path / "cache")
    chunk = next((tmp_path / "cache" / "shards").glob("*/vision_logits/c/0/0"))
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    code, _, err = call(
        *train(student_path, data_path, tmp_path / "o", "--cache", tmp_path / "cache", "--batch-size", 2)
    )
    assert code == 1
    assert "vision_logits/c/0/0" in err
    code, out, _ = call("inspect", tmp_path / "cache", "--verify", "--json")
    damaged = json.loads(out)["damaged"]
    assert code == 1
    assert [entry["name"].split("/", 2)[2] for entry in damaged] == ["vision_logits/c/0/0"]


def test_a_whole_run(call, student_path, data_path, cache_path, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"training": {"max_steps": 1}, "student": {"vision_pool": 2}}))
    code, out, err = call(
        *train(
            student_path, data_path, tmp_path / "o", "--cache", cache_path, "--recipe", recipe, "--eval-data", data_path
        )
    )
    assert code == 0
    assert out.startswith(f"trained {tmp_path}/o: ")
    assert "eval_accuracy" in out
    assert "saved to" in err


def test_help_names_every_option_that_is_fixed(call):
    fixed = {
        "cache-teacher": "--teacher --data --cache --top-k --answer-top-k --precision --affinity-precision --workers "
        "--gpus-per-worker --address --batch-tokens --max-length --dtype --attn-implementation --revision --limit "
        "--dry-run --max-skipped --extend --repair --clean --for-student",
        "train-student": "--student --data --cache --output --recipe --alpha --beta --gamma --tail --vision-pool "
        "--eval-data --epochs --max-steps --batch-size --learning-rate --resume",
        "inspect": "--sample --list --page --verify --json --against-teacher --data --samples",
        "demo": "--out --seeds --ablate",
    }
    for command, options in fixed.items():
        code, out, _ = call(command, "--help")
        assert code == 0
        for option in options.split():
            assert option in out, option


@pytest.mark.slow
def test_ctrl_c_exits_with_130(student_path, data_path, cache_path, tmp_path):
    arguments = train(student_path, data_path, tmp_path / "o", "--cache", cache_path, "--max-steps", 100_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "emkd.cli", *map(str, arguments)], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    for line in process.stderr:
        if line.startswith("step"):
            break
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "emkd: stopped by Ctrl-C after step" in rest
    assert "Traceback" not in rest


def test_a_wrong_path_is_found_before_torch_is_loaded(student_path, data_path, tmp_path):
    code = (
        "import sys, emkd.cli\n"
        "try:\n    emkd.cli.main()\n"
        "finally:\n    print([m for m in ('torch', 'transformers', 'ray') if m in sys.modules])"
    )
    right = {"--student": student_path, "--data": data_path, "--output": tmp_path / "o", "--cache": None}
    for flag, message in (("--data", "no data at"), ("--student", "no model"), ("--cache", "no cache at")):
        given = {**right, flag: tmp_path / "wrong"}
        flags = [str(part) for name, value in given.items() if value is not None for part in (name, value)]
        found = subprocess.run([sys.executable, "-c", code, "train-student", *flags], capture_output=True, text=True)
        assert (found.returncode, found.stdout) == (2, "[]\n"), found.stderr
        assert message in found.stderr


@pytest.mark.parametrize("command", ["cache-teacher", "init-student", "inspect", "demo"])
def test_each_command_says_after_a_signal_what_it_left(call, monkeypatch, command, tmp_path):
    """The signal comes as soon as the command has begun."""
    found = next(entry for entry in app.registered_commands if entry.name == command)
    monkeypatch.setattr(found, "callback", lambda: os.kill(os.getpid(), signal.SIGTERM))
    code, out, err = call(command)
    assert (code, out) == (143, "")
    assert err == f"emkd: interrupted by SIGTERM; {LEFT[command]}\n"


def test_import_and_version_are_instant():
    code = "import sys, emkd; print(emkd.__version__, [m for m in ('torch', 'ray', 'zarr', 'pyarrow') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split()[1] == "[]"
