"""The README's commands, run as they stand; the demonstration's folder has small stand-ins of the same names."""

import json
import re
import shlex
import shutil
from pathlib import Path
from statistics import mean

import pytest
import yaml

from emkd.cli import main
from emkd.demo.report import REGIME

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_it_opens_with_the_two_commands():
    commands = [line.split("#")[0].strip() for line in BLOCKS[0].splitlines()]
    assert commands == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "setup", "check"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.xdist_group("ray")
def test_the_commands_by_hand(teacher_path, data_path, student_path, tmp_path, monkeypatch, capsys):
    demo = tmp_path / "demo-out"
    shutil.copytree(teacher_path, demo / "teacher")
    shutil.copytree(student_path, demo / "student-init")
    for name in ("train", "validation"):
        (demo / "data").mkdir(exist_ok=True)
        shutil.copy(data_path, demo / "data" / f"{name}.parquet")
    recipe = {"training": {"max_steps": 2, "per_device_train_batch_size": 2}, "student": {"vision_pool": 2}}
    (demo / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line) for line in BLOCKS[1].splitlines()]
    assert [command[:2] for command in commands] == [["emkd", c] for c in ("cache-teacher", "inspect", "train-student")]
    for command in commands:
        with pytest.raises(SystemExit) as left:
            main(command[1:])
        assert not left.value.code, capsys.readouterr().err
    assert (tmp_path / "my-student" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "page", sorted(p.relative_to(ROOT).as_posix() for p in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), target


def test_the_figures_are_those_of_the_results_file():
    """Each row of the table is `variant | accuracy`, with the mean over the seeds of benchmarks/results."""
    readme = (ROOT / "README.md").read_text()
    found = json.loads((ROOT / "benchmarks" / "results" / "demo_seeds.json").read_text())
    rows = dict(re.findall(r"^\| ([a-z+-]+) \| .*\| ([0-9.]+)% \|$", readme, re.MULTILINE))
    expected = {name: f"{100 * mean(entry['accuracy']):.1f}" for name, entry in found["results"]["students"].items()}
    assert rows == {"teacher": f"{100 * found['results']['teacher']['accuracy']:.1f}", **expected}
    for name, entry in found["paired_differences"].items():
        text = f"| {name} | {100 * entry['mean']:+.1f} ± {100 * entry['standard_error']:.1f} |"
        assert text in readme, text


def test_each_at_its_own_best_is_said():
    """What README and demonstration say of the choice on validation scenes is what its results file has."""
    best: dict[str, float] = {}
    for entry in json.loads((ROOT / "benchmarks" / "results" / "demo_choice.json").read_text())["results"]:
        best[entry["variant"]] = max(best.get(entry["variant"], 0), mean(entry["accuracy"]))
    sft, emkd = (f"{100 * best[name]:.1f}%" for name in ("sft", "emkd"))
    assert f"SFT at its own best recipe reaches {sft} and EM-KD {emkd}" in (ROOT / "README.md").read_text()
    assert f"{emkd} there, and {sft} for SFT at its own best" in " ".join(REGIME.split())
