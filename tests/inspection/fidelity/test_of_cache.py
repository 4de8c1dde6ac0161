"""The fidelity figures of a cache, against the same written out with scipy and sums over all ids in float64."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from emkd.inspection.compare.against_teacher import LiveSettings, compare_with_teacher
from emkd.inspection.compare.live_teacher import load_teacher, read
from emkd.inspection.fidelity import of_cache as room
from emkd.inspection.fidelity.synthetic_student import synthetic_student
from emkd.samples.dataset import Dataset
from emkd.storage.cache import Cache
from emkd.vlm.affinity import affinity
from emkd.vlm.truncated import TruncatedLogits
from tests import tiny
from tests.trainer import naive

K, V = 8, 26


@pytest.fixture(scope="module")
def cut_path(teacher_path, data_path, tmp_path_factory):
    return tiny.make_cache(
        teacher_path, data_path, tmp_path_factory.mktemp("cut") / "cache", top_k=K, answer_top_k=K, affinity_precision="int8"
    )  # fmt: skip


def compare(cache, teacher, data, **chosen):
    return compare_with_teacher(cache, LiveSettings(against_teacher=str(teacher), data=str(data), **chosen), print)


def kl(student, teacher):
    log_s, log_t = student.double().log_softmax(1), teacher.double().log_softmax(1)
    return float((log_s.exp() * (log_s - log_t)).sum())


def smooth_l1(text, vision, teacher, own, theirs, distance, seed):
    """VLAD of the pairs, entry by entry: half the square of differences below 1."""
    ours = affinity(synthetic_student(text, len(text), distance, seed=seed), vision)
    gaps = [float(ours[i, a] - teacher[i, b]) for i in range(len(text)) for a, b in zip(own, theirs, strict=True)]
    return sum(gap**2 / 2 if abs(gap) < 1 else abs(gap) - 0.5 for gap in gaps) / len(gaps)


@torch.no_grad()
def expected(cache, teacher, data, distance):
    """Of the first image of samples 0 and 1, by hand: {figure: value}."""
    found, best, random, sums = 0.0, 0.0, 0.0, {}
    for number in (0, 1):
        record = cache.record(number)
        states = teacher.states(read(teacher, data, int(cache.sample_rows[number]), record))
        first = states.vision[:16]
        dense = teacher.logits(first)
        vision = synthetic_student(first, 4, distance, seed=number)
        student = teacher.logits(vision)
        cut = TruncatedLogits.of(record.vision, V).rows(slice(0, 16))
        cost = torch.cdist(student.double(), dense.double(), p=1).numpy()
        own, theirs = linear_sum_assignment(cost)
        cut_own, cut_theirs = linear_sum_assignment(naive.cost(student, cut).numpy())
        found, best = found + cost[cut_own, cut_theirs].sum(), best + cost[own, theirs].sum()
        random += cost.mean() * 4
        answers = synthetic_student(states.predicting, len(states.predicting), distance, seed=number)
        answer = TruncatedLogits.of(record.answer, V)
        for name, value in {
            "vsd": kl(student[own], dense[theirs]),
            "vsd_uniform": float(naive.reverse_kl(student[own], cut.rows(torch.from_numpy(theirs)), "uniform").sum()),
            "vsd_bucket": float(naive.reverse_kl(student[own], cut.rows(torch.from_numpy(theirs)), "bucket").sum()),
            "vlad": smooth_l1(states.text, vision, affinity(states.text, first), own, theirs, distance, number),
            "vlad_cut": smooth_l1(
                states.text, vision, torch.from_numpy(record.affinity), cut_own, cut_theirs, distance, number
            ),
            "rld": kl(teacher.logits(answers), teacher.logits(states.predicting)),
            "rld_uniform": float(naive.reverse_kl(teacher.logits(answers), answer, "uniform").sum()),
            "rld_bucket": float(naive.reverse_kl(teacher.logits(answers), answer, "bucket").sum()),
        }.items():
            sums[name] = sums.get(name, 0.0) + value
    errors = {name: value / sums[name.partition("_")[0]] - 1 for name, value in sums.items() if "_" in name}
    return {"regret": (found - best) / (random - best), **errors}


def test_figures_are_those_of_a_plain_reference(cut_path, teacher_path, data_path):
    report = compare(cut_path, teacher_path, data_path, samples=5)["fidelity"]
    assert [image["sample"] for image in report["images"]] == [0, 1, 3, 4]  # of five with images, the first four
    cache, data = Cache.open(cut_path), Dataset(str(data_path))
    teacher = load_teacher(cache, LiveSettings(against_teacher=str(teacher_path), data=str(data_path)))
    samples = []
    for number in (0, 1):
        record = cache.record(number)
        states = teacher.states(read(teacher, data, int(cache.sample_rows[number]), record))
        samples.append(room.LiveSample(number=number, states=states, record=record))
    figures = room.cache_fidelity(teacher, samples)
    assert figures["images"] == [
        {"sample": 0, "teacher_tokens": 16, "of": 16, "student_tokens": 4, "answers": 3},
        {"sample": 1, "teacher_tokens": 16, "of": 16, "student_tokens": 4, "answers": 3},
    ]
    for distance in ("near", "far"):
        for name, value in expected(cache, teacher, data, distance).items():
            loss, _, tail = name.partition("_")
            found = figures[distance]["regret"] if name == "regret" else figures[distance][loss]
            given = found if name == "regret" else (found if tail == "cut" else found[tail])["loss_error"]
            assert given == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert figures["near"]["noise"] < figures["far"]["noise"]


def test_nothing_is_lost_where_all_logits_are_stored(cache_path, teacher_path, data_path):
    figures = compare(cache_path, teacher_path, data_path)["fidelity"]
    for distance in ("near", "far"):
        assert figures[distance]["regret"] == pytest.approx(0, abs=1e-9)
        losses = [figures[distance][loss][tail] for loss in ("vsd", "rld") for tail in ("bucket", "uniform")]
        for found in (*losses, figures[distance]["vlad"]):
            assert found["loss_error"] == pytest.approx(0, abs=1e-4)
            assert found["gradient_cosine"] == pytest.approx(1, abs=1e-5)
            assert found["gradient_norm_ratio"] == pytest.approx(1, abs=1e-4)


def test_large_images_are_cut_to_what_is_affordable_and_that_is_said(
    cut_path, teacher_path, data_path, monkeypatch, capsys
):
    """n n / 4 V numbers for each of 2 distances of 2 images: 8 tokens cost 1,664."""
    from emkd.inspection.terminal.comparison import render_comparison

    monkeypatch.setitem(room.BUDGET, "cpu", 1664)
    report = compare(cut_path, teacher_path, data_path, samples=2)
    assert [
        (image["teacher_tokens"], image["of"], image["student_tokens"]) for image in report["fidelity"]["images"]
    ] == [
        (8, 16, 2),
        (8, 16, 2),
    ]
    render_comparison(report)
    said = " ".join(capsys.readouterr().out.split())
    assert "answer tokens: sample 0 (8 of 16 vision tokens) sample 3 (8 of 16 vision tokens)" in said


def test_what_cannot_be_computed_says_why(cut_path, teacher_path, data_path, tmp_path, monkeypatch, capsys):
    from emkd.inspection.terminal.comparison import render_comparison

    other = tiny.save_model(tmp_path / "other", seed=9, hidden=32)
    assert compare(cut_path, other, data_path)["fidelity"] == {"missing": "this teacher is not the cache's teacher"}
    text = tiny.write_data(tmp_path / "text.parquet", [tiny.rows()[2]])
    cache = tiny.make_cache(teacher_path, text, tmp_path / "cache")
    assert "none of the compared samples has an image" in compare(cache, teacher_path, text)["fidelity"]["missing"]

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("emkd.inspection.compare.against_teacher.cache_fidelity", full)
    report = compare(cut_path, teacher_path, data_path, samples=1)
    assert (report["agrees"], "do not fit into memory" in report["fidelity"]["missing"]) == (True, True)
    render_comparison(report)
    assert "not computed, dense logits of an image do not fit into memory" in " ".join(capsys.readouterr().out.split())


def test_figures_without_a_number_are_none():
    assert room.without_nan({"a": float("nan"), "b": {"c": 1.0, "d": float("nan")}}) == {
        "a": None,
        "b": {"c": 1.0, "d": None},
    }
