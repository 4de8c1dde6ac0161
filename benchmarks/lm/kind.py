"""All figures of one kind of vision tokens: the job, the settings, what is learnt, and width."""

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.lm.learning import gain
from benchmarks.lm.settings import Kept, dense, figures, in_own_block, keep, vision_bytes
from benchmarks.lm.students import STUDENTS, make_student
from benchmarks.lm.teacher import make_teacher
from emkd.inspection.report.summary import summarize
from emkd.pipeline.basis import Moments, Spectrum, head_metric
from emkd.pipeline.basis_choice import BasisChooser, StateSample
from emkd.pipeline.capture import CaptureSettings, Teacher
from emkd.pipeline.job import cache_teacher
from emkd.pipeline.settings import JobSettings
from emkd.samples.dataset import Dataset
from emkd.storage.arrays.frames import encode_frame
from emkd.storage.cache import Cache
from emkd.storage.manifest.codes import CodesAsked
from emkd.trainer.data.samples import TeacherLimits
from emkd.vlm.codes import Codes
from emkd.vlm.loading import load
from emkd.vlm.states import States

ERRORS = (1.6, 0.8, 0.4, 0.2)
LEARNT = ("default", "top 64")
WIDTHS = (144, 288, 576)
TRAIN = 12  # images that the adaptor learns from
# The student that learns: the mid one, with the weights of the teacher, has next to nothing to learn on B and C.
LEARNER = "far"
DEFAULT = CodesAsked(logit_error=0.8, token_bytes=160)


def figures_of_kind(folder: Path, kind: str, n_fit: int, n_held_out: int, seeds: int, reuse: bool) -> dict[str, Any]:
    """Return {job, settings, gains, width, seconds}. See benchmarks/real_lm.py."""
    started = time.perf_counter()
    n_images = n_fit + n_held_out
    if not (folder / "data.parquet").exists():
        folder.mkdir(parents=True, exist_ok=True)
        make_teacher(folder, kind, n_images)
    job = _job(folder, n_fit, reuse)
    _say(kind, started, "cached")
    cache = Cache.open(folder / "cache")
    vlm = load(str(folder / "teacher"), dtype="float32", device="cpu", trust_remote_code=True)
    teacher = Teacher(vlm, CaptureSettings.of(cache.manifest))
    dataset = Dataset(str(folder / "data.parquet"))
    items = {number: teacher.encoder(dataset.sample(number)) for number in range(n_images)}
    states = {number: _own(teacher.states(item)) for number, item in items.items()}
    _say(kind, started, "states")
    fit, held_out = list(range(n_fit)), list(range(n_fit, n_images))
    sample = StateSample()
    for number in fit:
        sample.add(states[number])
    chooser = BasisChooser(teacher, sample, cache.manifest.with_basis(None), 1 << 30)
    seen = {number: states[number] for number in held_out}
    cuts, kept = _settings(teacher, chooser, cache, seen)
    images = [each.vision for each in seen.values()]
    found: dict[str, Any] = {
        name: {"bytes": vision_bytes(chooser, one, cuts[name], images), "students": {}} for name, one in kept.items()
    }
    learnt: dict[str, list[float]] = {}
    with torch.inference_mode(False):
        for student_name in STUDENTS:
            student = make_student(
                student_name, vlm.model, {n: items[n] for n in (held_out if student_name != LEARNER else items)}
            )
            exact = dense(teacher, seen, student)
            _say(kind, started, f"{student_name}: dense")
            for name, one in kept.items():
                same = name != "default" and cuts[name] == cuts["default"] and name != "from the cache"
                known = found["default"]["students"]
                found[name]["students"][student_name] = known[student_name] if same else figures(exact, one)
                if name in ("default", "top 64"):
                    found[name]["students"][student_name]["in_own_block"] = in_own_block(exact, one)
            _say(kind, started, f"{student_name}: settings")
            if student_name == LEARNER and seeds:
                train = fit[:TRAIN]
                exact |= dense(teacher, {n: states[n] for n in train}, student)
                learnt = _learnt(teacher, chooser, states, student, exact, train, held_out, cuts, seeds)
                _say(kind, started, "learning")
    return {
        "job": job,
        "settings": found,
        "gains": learnt,
        "width": _width(chooser, states, fit, held_out),
        "seconds": time.perf_counter() - started,
    }


def _job(folder: Path, n_fit: int, reuse: bool) -> dict[str, Any]:
    """Run the product's job: first the rows that the basis is made from, then the others.

    reuse: keep the cache of an earlier run if it is whole
    """
    if not (folder / "cache" / "extensions").exists() or not reuse:
        shutil.rmtree(folder / "cache", ignore_errors=True)
    settings = JobSettings(
        teacher=str(folder / "teacher"),
        data=str(folder / "data.parquet"),
        cache=str(folder / "cache"),
        affinity="codes",
        gpus_per_worker=0,
        dtype="float32",
        trust_remote_code=True,
        rows_per_shard=n_fit,
        batch_tokens=1024,
    )
    if not (folder / "cache").exists():
        cache_teacher(replace(settings, limit=n_fit))
    cache = cache_teacher(settings, extend=True)
    report = summarize(cache)
    return {
        "bytes_per_vision_token": report["bytes_per_vision_token"]["total"],
        "bytes_by_array": report["bytes_per_vision_token"],
        "text_tokens_per_sample": report["tokens"]["text"] / report["samples"],
        "codes": report["codes"],
        "logit_error": report["logit_error"],
    }


def _settings(
    teacher: Teacher, chooser: BasisChooser, cache: Cache, seen: dict[int, States]
) -> tuple[dict[str, Any], dict[str, Kept]]:
    """(the cut of each setting's codes, what it keeps of the held-out images)"""
    cuts: dict[str, Any] = {"default": chooser.cut_for(DEFAULT)}
    cuts |= {f"error {error:g}": chooser.cut(error) for error in ERRORS}
    kept = {name: keep(teacher, seen, 8, Codes(chooser.basis(cut), "cpu")) for name, cut in cuts.items()}
    images = [each.vision for each in seen.values()]
    equal = vision_bytes(chooser, kept["default"], cuts["default"], images)
    per_logit = vision_bytes(chooser, keep(teacher, seen, 64, None), None, images) / 64
    for name, k in (
        ("top 64", 64), ("equal bytes", max(1, round(equal / per_logit))),
        ("twice the bytes", max(2, round(2 * equal / per_logit))),
    ):  # fmt: skip
        cuts[name], kept[name] = None, keep(teacher, seen, k, None)
    cuts["from the cache"], kept["from the cache"] = cuts["default"], _from_cache(cache, list(seen))
    return cuts, kept


def _from_cache(cache: Cache, numbers: list[int]) -> Kept:
    """Read the held-out rows as the trainer does."""
    v = cache.manifest.vocabulary_size
    limits = TeacherLimits(vocabulary=v, n_student_tokens=v)
    by_row = {int(row): number for number, row in enumerate(cache.sample_rows)}
    samples = {number: limits(cache.record(by_row[number])) for number in numbers}
    assert cache.basis is not None
    return Kept(
        vision={number: sample.vision for number, sample in samples.items()},
        answer={number: sample.answer for number, sample in samples.items()},
        codes=Codes(cache.basis, "cpu"),
    )


def _learnt(
    teacher: Teacher,
    chooser: BasisChooser,
    states: Any,
    student: Any,
    exact: Any,
    fit: Any,
    held_out: Any,
    cuts: Any,
    seeds: int,
) -> dict[str, list[float]]:
    """Return the gain of each seed, with the dense teacher and from each of LEARNT."""
    found: dict[str, list[float]] = {name: [] for name in ("dense", *LEARNT)}
    train = {n: states[n] for n in fit}
    forms = {
        name: keep(teacher, train, 64, None) if cuts[name] is None
        else keep(teacher, train, 8, Codes(chooser.basis(cuts[name]), "cpu"))
        for name in LEARNT
    }  # fmt: skip
    for seed in range(seeds):
        for name in found:
            found[name].append(gain(exact, student, fit, held_out, forms.get(name), seed))
        print(f"VSD on held-out images falls by {found}", flush=True)
    return found


def _width(chooser: BasisChooser, states: Any, fit: Any, held_out: Any) -> dict[str, Any]:
    """Bytes of codes and leading variances, with states and head cut to their first numbers."""
    found = {}
    for width in WIDTHS:
        metric = head_metric(chooser.weight[:, :width])
        halves = [
            Moments.of(torch.cat([torch.cat([states[n].vision, states[n].text])[:, :width] for n in fit[half::2]]))
            for half in (0, 1)
        ]
        spectrum = Spectrum.of(halves, metric)
        found[str(width)] = {
            "variances": [round(float(v), 4) for v in spectrum.variance[:64]],
            "bytes": {f"{error:g}": _code_bytes(spectrum, error, states, held_out, width) for error in ERRORS},
        }
    return found


def _code_bytes(spectrum: Spectrum, error: float, states: Any, held_out: Any, width: int) -> float:
    cut = spectrum.at_error(error, width)
    groups, total, n = spectrum.groups(cut), 0, 0
    for number in held_out:
        vision = states[number].vision[:, :width]
        q = ((vision - spectrum.mean.float()) @ spectrum.projection[:, : cut.n_columns].float() / cut.step).round()
        total += len(encode_frame(q.clamp(-32767, 32767).to(torch.int16).numpy(), groups))
        n += len(vision)
    return total / n


def _own(states: States) -> States:
    """Clones: autograd cannot save tensors that inference mode made."""
    return States(vision=states.vision.clone(), text=states.text.clone(), predicting=states.predicting.clone())


def _say(kind: str, started: float, what: str) -> None:
    print(f"{kind}: {what} after {time.perf_counter() - started:.0f} s", flush=True)
