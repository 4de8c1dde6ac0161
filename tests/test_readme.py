"""The README's commands, run as they stand; the demonstration's folder has small stand-ins of the same names."""

import json
import re
import shlex
import shutil
from pathlib import Path
from statistics import mean, median

import pytest
import yaml

from emkd.cli import main
from emkd.demo.report import REGIME
from emkd.trainer.recipe.recipe import Recipe

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


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_what_it_costs_is_what_was_measured():
    """Each row of both tables, written from the results files."""
    readme, found = (ROOT / "README.md").read_text(), results("matching")
    cost, memory = found["cost"]["against_dense"], found["memory"]["median"]
    seconds = cost["seconds"]
    head, rest = (1e3 * median(run[part] for run in seconds["ours"]) for part in ("lm_head", "rest"))
    whole = 1e3 * median(seconds["lm_head_all_ids"])
    plain, chunked = memory["plain"], memory["chunked"]
    steps = results("step")["step_ratio"]

    def ratio(case, name):
        return f"{steps[case][name]:.2f}" if name in steps[case] else "not measured"

    for row in (
        f"| cost matrix of a tile, 144 x 729 tokens | {median(seconds['cdist']):.1f} s | {rest:.0f} ms | {cost['cost_speedup']:,.0f} times faster |",
        f"| the LM head for it | {whole:.0f} ms | {head:.0f} ms | {cost['different_ids']:,} of 151,936 ids |",
        f"| VSD of 2,880 tokens, peak memory | {plain['peak_mib']:,.0f} MiB | {chunked['peak_mib']:,.0f} MiB | {found['peak_memory_ratio']:.2f} of it |",
        f"| the same, time | {plain['seconds']:.0f} s | {chunked['seconds']:.0f} s | {found['memory']['time_ratio']:.2f} of it |",
        *(
            f"| {text} | {ratio(case, 'cache/sft')} | {ratio(case, 'memory cache/sft')} | {ratio(case, 'dense teacher/cache')} | {ratio(case, 'teacher with our losses/cache')} |"
            for case, text in (
                ("demo", "the demonstration's models"),
                ("cpu-larger", "a larger random pair, V = 32,000"),
                ("cpu-real", "a student of 0.5B, V = 151,936"),
                ("gpu", "that student and a teacher of 7B, on a GPU"),
            )
        ),
    ):
        assert row in readme, row
    assert found["machine"]["threads"] == "1"


def storage_rows(found):
    """The rows of README's tables about the cache, from storage.json."""
    sizes, rates, ratios = (found[key] for key in ("bytes_per_vision_token", "read_samples_per_s", "read_ratios"))
    index, driver = found["index"]["1000000"]["median"], found["driver"]["100000"]["median"]
    shared, own = found["sharing"]["median"].values()

    def level(k, precision):
        one = sizes[f"k={k} {precision}"]
        kl = f"{one['kl']:.1e}" if one["kl"] else "0"
        return f"| emkd, k = {k}, `{precision}` | {one['ids_and_logits']:.0f} | {kl} | {one['whole_record']:.0f} |"

    def reader(system, text):
        return f"| {text} | {rates['1'][system]:,.0f} | {rates['2'][system]:,.0f} |"

    return [
        *(level(k, precision) for k in (64, 128) for precision in ("bfloat16", "step0.1", "step0.2")),
        level(50, "step0.1"),
        level(50, "step0.2"),
        reader("emkd-zstd", "emkd, zstd, every byte checked"),
        reader("emkd-lz4", "emkd, lz4, every byte checked"),
        reader("mds-same-zstd", "MDS, the same arrays and codec, zstd"),
        reader("mds-same-lz4", "MDS, the same arrays and codec, lz4"),
        *(reader(f"emkd-{codec}+kept", f"emkd, {codec}, memory kept") for codec in ("zstd", "lz4")),
        *(reader(f"mds-same-{codec}+kept", f"MDS, the same arrays, {codec}, memory kept") for codec in ("zstd", "lz4")),
        reader("zarr-slices", "slices of Zarr arrays, zstd"),
        reader("raw-memmap", "raw numbers, memory-mapped"),
        f"| an entry of the affinity | {found['affinity_bytes_per_entry']:.3f} bytes, error at most {found['affinity_largest_error']:.4f} |",
        *(
            f"| reading: emkd / MDS with the same arrays, {codec} | {one['1']:.2f}, two processes {one['2']:.2f}; "
            f"memory kept {kept['1']:.2f}, {kept['2']:.2f} |"
            for codec in ("zstd", "lz4")
            for one, kept in [[ratios[f"{codec}_over_mds_same_codec{end}"] for end in ("", "_kept")]]
        ),
        f"| encoding and writing a sample of 2,916 vision tokens | {found['encode_ms']:.1f} ms of CPU |",
        f"| the job / the bare teacher, 0.1B, V = 151,936, on a CPU | {found['capture_overhead']['cpu-100m']:.2f} |",
        f"| the job / the bare teacher, 0.1B, V = 32,000, on a CPU | {found['capture_overhead']['cpu-100m-32k']:.2f} |",
        f"| the job / the demonstration's tiny teacher | {found['capture_overhead']['demo']:.2f} |",
        f"| 1,000,000 samples: open | {index['open_s']:.2f} s, {index['open_peak_mib']:,.0f} MiB |",
        f"| 1,000,000 samples: `emkd inspect` | {index['inspect_s']:.1f} s |",
        f"| 100,000 shards: driver, a shard | {driver['ms_per_shard']:.1f} ms, {driver['rss_growth_mib']:.0f} MiB more than after 500 shards |",
        f"| 40% of rows share images: bytes of vision tokens | {shared['with']['vision_bytes'] / own['with']['vision_bytes']:.2f} of those of rows that do not |",
    ]


def test_the_cache_in_figures_is_what_was_measured():
    readme, found = (ROOT / "README.md").read_text(), results("storage")
    for row in storage_rows(found):
        assert row in readme, row
    assert all(part["machine"]["threads"] == "1" and not part["dirty"] for part in found["parts"].values())


def test_the_choice_of_the_tail_is_what_was_measured():
    """Each row of docs/method.md's table of cuts, and the rule's figures."""
    page, found = (ROOT / "docs" / "method.md").read_text(), results("matching")["fidelity"]

    def percent(number):
        return f"{100 * number:+.0f}%".replace("-", "−")

    for entry in found["synthetic"]:
        cosines = [
            " / ".join(f"{entry[loss][tail]['gradient_cosine']:.2f}" for tail in ("bucket", "uniform"))
            for loss in ("vsd", "rld")
        ]
        errors = [
            " / ".join(percent(entry[loss][tail]["loss_error"]) for tail in ("bucket", "uniform"))
            for loss in ("vsd", "rld")
        ]
        row = f"| {entry['student']} | {entry['k']} | {entry['regret']:.2f} | {' | '.join(cosines + errors)} |"
        assert row in page, row
    assert found["choice"]["tail"] == Recipe().losses.tail
    for loss in ("vsd", "rld"):
        bucket, uniform = (found["choice"]["gradient_cosine"][tail][loss] for tail in ("bucket", "uniform"))
        assert f"{uniform:.2f}\nagainst {bucket:.2f}" in page or f"{uniform:.2f} against {bucket:.2f}" in page
