"""The settings that `cache-teacher --dry-run` compares, on a small teacher, and the sentence that follows."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console

from emkd.inspection.fidelity import choices
from emkd.inspection.fidelity.choices import Setting, advice, measure, with_job
from emkd.inspection.terminal.choices import render_choices
from emkd.pipeline.cache_size import Sizes
from emkd.pipeline.job_manifest import job_manifest
from emkd.pipeline.preflight import Estimate
from emkd.pipeline.settings import JobSettings
from emkd.pipeline.worker import CaptureWorker
from emkd.samples.dataset import Dataset
from emkd.vlm.states import States
from tests import tiny

FIGURES = {"regret", "vsd_error", "rld_error", "vlad_cosine", "hidden_cosine", "joint_cosine"}


@pytest.fixture(scope="module")
def found(teacher_path, tmp_path_factory):
    """Settings with 4 stored logits, and a text-only row among those that are measured."""
    data = tiny.write_data(tmp_path_factory.mktemp("data") / "rows.parquet", tiny.rows() * 2)
    chosen = JobSettings(
        teacher=str(teacher_path), data=str(data), cache="nowhere", gpus_per_worker=0, top_k=4, answer_top_k=5
    )
    worker = CaptureWorker(chosen, job_manifest(chosen, Dataset(str(data)))[0])
    settings = (
        Setting(top_k=26), Setting(top_k=4), *(Setting(top_k=4, error=error) for error in (1.0, 0.3, 0.1)),
        Setting(top_k=4, error=1e-3), Setting(top_k=4, error=1e-9),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choices, "SETTINGS", settings)
        return worker, worker.study(measure, [0, 1, 2, 3, 4, 5], [7, 8, 9])


def test_all_figures_of_all_settings(found):
    _, compared = found
    assert compared["images"] == 2  # row 8 has text alone
    assert [each["name"] for each in compared["settings"]] == [
        "top 26 alone", "top 4 alone", "error 1", "error 0.3", "error 0.1", "error 0.001", "error 1e-09",
    ]  # fmt: skip
    *possible, last = compared["settings"]
    assert "at most 32767 fits" in last["missing"]
    for each in possible:
        assert each["near"].keys() == each["far"].keys() == FIGURES
        assert each["bytes"]["total"] == each["bytes"]["logits"] + each["bytes"]["codes"]


def test_nothing_cut_loses_nothing_and_codes_lose_less_than_the_top_alone(found):
    whole, alone, coarse, middle, fine, exact, _ = found[1]["settings"]
    for distance in ("near", "far"):
        assert whole[distance]["regret"] == 0
        assert whole[distance]["joint_cosine"] == pytest.approx(1, abs=1e-3)
        assert fine[distance]["joint_cosine"] > alone[distance]["joint_cosine"]
        assert fine[distance]["hidden_cosine"] > middle[distance]["hidden_cosine"] > coarse[distance]["hidden_cosine"]
        assert abs(fine[distance]["vsd_error"]) < abs(alone[distance]["vsd_error"])
        assert exact[distance]["hidden_cosine"] == pytest.approx(1, abs=1e-3)
    assert [each["bytes"]["codes"] > 0 for each in (whole, alone, coarse)] == [False, False, True]
    assert coarse["bytes"]["codes"] < middle["bytes"]["codes"] < fine["bytes"]["codes"]


def test_the_logit_error_is_measured_on_unseen_rows(found):
    _, alone, *coded, _, _ = found[1]["settings"]
    for each, predicted in zip(coded, (1.0, 0.3, 0.1), strict=False):
        assert each["logit_error"] <= 1.25 * predicted
    assert alone["logit_error"] > coded[1]["logit_error"]


@torch.inference_mode()
def test_the_error_without_codes_is_that_of_the_mean_of_the_tail(found):
    """Against logits written out."""
    worker, compared = found
    teacher, dataset = worker._loaded()
    squares = []
    for row in (7, 9):
        logits = teacher.logits(teacher.states(teacher.encoder(dataset.sample(row))).vision).double()
        order = logits.argsort(dim=1, descending=True)
        rest = logits.gather(1, order[:, 4:])
        stored = logits.gather(1, order[:, :4])
        rounding = (stored - stored.to(torch.bfloat16).double()).square().sum(dim=1)
        squares.append(((rest - rest.mean(dim=1, keepdim=True)).square().sum(dim=1) + rounding) / logits.shape[1])
    expected = float(torch.cat(squares).mean().sqrt())
    assert compared["settings"][1]["logit_error"] == pytest.approx(expected, rel=1e-4)


def estimate(study):
    return Estimate(
        n_rows=100, n_shards=1, sizes=Sizes(per_row=1000.0, per_shard=0.0, once=0), bytes_per_vision_token=1.0, seconds=1.0,
        free_bytes=10**9, vision_tokens=1000.0, logits_and_codes=60.0, basis_bytes=5000, study=study,
    )  # fmt: skip


def test_bytes_of_the_whole_job_differ_by_what_a_vision_token_takes(found):
    compared = with_job(estimate(found[1]))
    for each in compared["settings"][:-1]:
        assert each["job_bytes"] == round(100_000 - 5000 + each["basis_bytes"] + 1000 * (each["bytes"]["total"] - 60))
    shown = Console(width=60, record=True, force_terminal=False)
    with shown.capture() as text:
        render_choices(compared, shown)
    assert "near student" in text.get()
    for each in compared["settings"]:
        assert text.get().count(each["name"]) >= 2
    assert text.get().count("not possible") == 2
    assert compared["advice"] in text.get().replace("\n", " ") or compared["advice"] in text.get()


def setting(name, total, regret, joint):
    figures = {"regret": regret, "joint_cosine": joint}
    return {"name": name, "flags": f"--{name}", "bytes": {"total": total}, "near": figures, "far": figures}


def test_the_advice_is_the_smallest_that_is_close_enough():
    few, good, best = setting("few", 20, 0.1, 0.5), setting("good", 60, 0.005, 0.92), setting("best", 90, 0.001, 0.99)
    assert advice([few, good, best]).startswith("Take --good: it is the smallest")
    assert advice([few, setting("lost", 50, 0.02, 0.95)]).startswith("Take --lost: none keeps")
    assert advice([{"name": "x", "flags": "", "missing": "memory"}]) == "No setting could be measured."


def test_rows_without_images_have_no_table(teacher_path, tmp_path):
    data = tiny.write_data(tmp_path / "rows.parquet", [tiny.rows()[2]] * 4)
    chosen = JobSettings(
        teacher=str(teacher_path), data=str(data), cache="nowhere", gpus_per_worker=0, top_k=4, answer_top_k=5
    )
    worker = CaptureWorker(chosen, job_manifest(chosen, Dataset(str(data)))[0])
    compared = with_job(estimate(worker.study(measure, [0, 1], [2])))
    assert compared == {
        "missing": "none of the rows that were measured has an image whose dense logits fit into memory"
    }
    shown = Console(width=60)
    with shown.capture() as text:
        render_choices(compared, shown)
    assert "settings are not compared: none of the rows" in text.get()


def test_without_codes_the_bytes_that_were_asked_for_are_those_of_the_logits(found):
    compared = with_job(replace(estimate(found[1]), logits_and_codes=0.0, basis_bytes=0))
    for each in compared["settings"][:-1]:
        expected = 100_000 + each["basis_bytes"] + 1000 * (each["bytes"]["total"] - found[1]["asked_bytes"])
        assert each["job_bytes"] == round(expected)


def test_rows_that_the_job_would_skip_are_left_out(found):
    """A row of NaN states, and one that cannot be read."""
    worker, _ = found
    teacher, dataset = worker._loaded()
    with pytest.MonkeyPatch.context() as patch:
        whole = teacher.states
        patch.setattr(
            teacher, "states", lambda item: States(**{n: x * float("nan") for n, x in vars(whole(item)).items()})
        )
        assert choices._states(teacher, dataset, 7) is None
    assert choices._states(teacher, dataset, 7) is not None
