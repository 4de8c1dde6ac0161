"""The README: its commands run, its links resolve, and its figures match benchmarks/results.

The demonstration's folder has small stand-ins of the same names.
"""

import re
import shlex
import shutil

import pytest
import yaml

from emkd.cli import main
from tests.figures import (
    ROOT,
    accuracies,
    lm_headline,
    matching,
    page,
    percent,
    results,
    table_rows,
)

README = page("README.md")
SHELL = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def commands(block):
    """The commands in a block of shell, without comments; a line that ends in a backslash continues."""
    return [words for line in block.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_two_commands_need_nothing_else():
    assert [["make", "demo"], ["make", "test"]] in [commands(block) for block in SHELL]
    makefile = page("Makefile")
    for target in ("demo", "test", "docs"):
        assert f"make {target}" in README
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.xdist_group("ray")
@pytest.mark.slow
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
    by_hand = commands(next(block for block in SHELL if "emkd cache-teacher" in block))
    assert by_hand.pop(0) == ["emkd", "demo", "--out", "demo-out"]
    assert [command[:2] for command in by_hand] == [["emkd", c] for c in ("cache-teacher", "inspect", "train-student")]
    for command in by_hand:
        with pytest.raises(SystemExit) as left:
            main(command[1:])
        assert not left.value.code, capsys.readouterr().err
    assert (tmp_path / "my-student" / "model.safetensors").is_file()
    capsys.readouterr()
    for block in PYTHON:
        exec(block, {})
    assert ", 8) (" in capsys.readouterr().out  # 8 logits of each vision token


@pytest.mark.parametrize(
    "name", sorted(p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page(name)):
        assert (ROOT / name).parent.joinpath(target).exists(), target


def test_anchors_lead_somewhere():
    anchors = [re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in headings("docs/benchmarks.md")]
    for anchor in re.findall(r"\(docs/benchmarks\.md#([^)]+)\)", README):
        assert anchor in anchors


def headings(name):
    return re.findall(r"^#+ (.+)$", page(name), re.MULTILINE)


def test_each_family_has_a_test():
    from tests.families import FAMILIES

    assert sorted(re.findall(r"`([a-z0-9_]+)`", "".join(table_rows(section("Models"))))) == sorted(FAMILIES)


def test_what_it_brings_is_what_was_measured():
    """Each row is `variant | description | accuracy`, and has a measured figure."""
    found = accuracies()
    rows = [re.fullmatch(r"\| ([a-z+-]+) \| .* \| (\S+) \|", row) for row in table_rows(section("What it brings"))]
    assert {row[1]: row[2] for row in rows} == {
        name: percent(found[name])
        for name in ("teacher", "student-init", "sft", "rld", "emkd", "emkd-pooled", "emkd-random")
    }


def test_what_it_proves_is_what_was_measured():
    found = results("demo_seeds")
    prose = " ".join(README.split())
    for other in ("rld", "emkd-random", "emkd-pooled"):
        assert f"{100 * found['paired_differences'][f'emkd - {other}']['mean']:.1f}" in prose
    students = {name: one["accuracy"] for name, one in found["results"]["students"].items()}
    for other in ("rld", "emkd-random"):
        assert all(a - b >= 0.04 for a, b in zip(students["emkd"], students[other], strict=True)), other
    assert (ROOT / "docs" / "pairs.png").is_file()


def test_what_it_costs_is_what_was_measured():
    """All rows of the table, and no other."""
    storage, memory, steps = results("storage"), results("matching")["memory"]["median"], results("step")["step_ratio"]
    cost, head, whole_head, dense = matching()
    ratios = [steps[case]["cache/sft"] for case in ("demo", "cpu-larger", "cpu-real")]
    size = storage["bytes_per_vision_token"]["k=64 bfloat16"]
    reading = [storage["read_ratios"][f"{codec}_over_mds_same_codec"]["1"] for codec in ("zstd", "lz4")]
    expected = [
        f"{cost:.0f} ms and {head:.0f} ms for the LM head; dense {dense:.1f} s and {whole_head:.0f} ms",
        f"{memory['chunked']['peak_mib']:.0f} MiB; with all logits in memory {memory['plain']['peak_mib']:,.0f} MiB",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
        f"{size['ids_and_logits']:.0f} bytes; {size['whole_record']:.0f} with affinity and answers",
        lm_headline(),
        f"{reading[0]:.2f} with zstd, {reading[1]:.2f} with lz4",
        f"{storage['capture_overhead']['cpu-100m']:.2f}",
        f"{storage['index']['1000000']['median']['open_s']:.2f} s",
    ]
    assert [row.strip("| ").split(" | ")[1] for row in table_rows(section("What it costs"))] == expected
    for name in ("matching", "step"):
        assert results(name)["machine"]["threads"] == "1"
    assert all(part["machine"]["threads"] == "1" and not part["dirty"] for part in storage["parts"].values())
