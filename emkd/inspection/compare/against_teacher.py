"""A cache compared with a live teacher on a few of its samples: `emkd inspect URI --against-teacher MODEL`.

    cache + data --select, pick--> samples --read--> tokens --Teacher.states--> hidden states
        --Differences----> live against stored numbers    --tolerance--> agrees or not
        --cache_fidelity-> what storing k logits changes, if the teacher agrees

The live side runs the job's code (emkd/pipeline/capture.py) up to the hidden states, and cuts or rounds nothing.
Logits exist a few tokens at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from emkd.errors import SampleError, SampleNotFoundError, TeacherMismatchError
from emkd.inspection.compare.differences import Difference, Differences
from emkd.inspection.compare.live_teacher import LiveSettings, likeness, load_teacher, made_by, pick, read
from emkd.inspection.damage import open_for_inspection
from emkd.inspection.fidelity.of_cache import IMAGES, LiveSample, cache_fidelity
from emkd.pipeline.capture import Teacher, does_not_fit
from emkd.pipeline.out_of_memory import unless_out_of_memory
from emkd.samples.dataset import Dataset
from emkd.samples.encode import Encoded
from emkd.storage.cache import Cache
from emkd.storage.record import Record
from emkd.trainer.data.selection import select
from emkd.vlm.checks import check_teacher
from emkd.vlm.states import States
from emkd.vlm.tolerance import Tolerance, tolerance

Log = Callable[[str], None]
VERSIONS = ("torch", "transformers")
TINY = 1e-300  # instead of a tolerance of 0, for a cache whose logits are all 0


def compare_with_teacher(uri: str | Path, settings: LiveSettings, log: Log) -> dict[str, Any]:
    """Return a report as plain values:

        teacher, revision, device, dtype, attention: what ran;  made_by: describes the cache's teacher
        sealed:      whether the cache is
        same, image_processor_differs_in: see `likeness`;  versions: {package: [when the cache was made, now]}
        samples:     {asked, compared, with_images, of}; "of": samples that cache and data share
        differences: {quantity: {n, mean, largest, beyond: {mean, largest}, tolerated: {mean, largest}, worst, agrees}};
                     quantities as in `TokenDifferences`, worst is a sample number
        worst:       the quantity that exceeds its tolerance most, None if all agree
        agrees:      whether all of them do; `check_agreement` raises an error if one does not
        fidelity:    see `cache_fidelity`, or {missing: reason}

    Raises InputNotFoundError, UsageError, DataMismatchError, TokenizerMismatchError, ModelError, CacheError,
    TeacherMismatchError (other tokens or images, before any number is compared), SampleError.
    """
    cache = open_for_inspection(uri)
    if cache.n_samples == 0:
        raise SampleNotFoundError(f"{uri} has no sample yet: there is nothing to compare a teacher with")
    dataset = Dataset(settings.data, settings.image_root, settings.follow_links)
    selection = select(cache, dataset, log)
    chosen = pick(cache, selection, settings.samples)
    teacher = load_teacher(cache, settings)
    found, kept = _compare_all(cache, dataset, teacher, chosen, log)
    differences = _all_judged(found, cache.manifest.teacher.dtype)
    wrong = {name: entry for name, entry in differences.items() if not entry["agrees"]}
    agrees = not wrong
    return {
        "uri": str(uri),
        "sealed": cache.sealed,
        **_what_was_run(cache, teacher, settings),
        "samples": {
            "asked": settings.samples,
            "compared": len(chosen),
            "with_images": sum(cache.sample_info(number).n_vision > 0 for number, _ in chosen),
            "of": len(set(selection.numbers.tolist())),
        },
        "differences": differences,
        "worst": max(wrong, key=lambda name: _excess(wrong[name]), default=None),
        "agrees": agrees,
        "fidelity": _fidelity(teacher, kept, log) if agrees else {"missing": "this teacher is not the cache's teacher"},
    }


def _compare_all(
    cache: Cache, dataset: Dataset, teacher: Teacher, chosen: Sequence[tuple[int, int]], log: Log
) -> tuple[Differences, list[LiveSample]]:
    """The differences of all chosen (sample, row), and the first few samples with images."""
    manifest = cache.manifest
    found = Differences(
        vocabulary=manifest.vocabulary_size,
        precision=manifest.logits_precision,
        affinity_precision=manifest.affinity_precision,
        codes=teacher.codes,
    )
    kept: list[LiveSample] = []
    for count, (number, row) in enumerate(chosen):
        log(f"sample {count + 1} of {len(chosen)}: row {row}")
        record = cache.record(number)
        encoded = read(teacher, dataset, row, record)
        try:
            states = unless_out_of_memory(partial(_compare, teacher, encoded, record, number, found, count == 0))
            if states is None:
                raise does_not_fit(encoded)
        except SampleError as error:
            raise SampleError(error.reason, f"row {row} of {dataset.data}: {error.detail}") from error
        if len(kept) < IMAGES and record.images:
            kept.append(LiveSample(number=number, states=states, record=record))
    return found, kept


def _compare(
    teacher: Teacher, encoded: Encoded, record: Record, number: int, found: Differences, first: bool
) -> States:
    if first:
        check_teacher(teacher.vlm, encoded, teacher.pad_token_id)
    states = teacher.states(encoded)
    found.add(states, record, teacher.logits, teacher.chunk, number)
    return states


def _fidelity(teacher: Teacher, samples: Sequence[LiveSample], log: Log) -> dict[str, Any]:
    if not samples:
        return {"missing": "none of the compared samples has an image"}
    log(f"computing what the stored logits do to matching and losses, on {len(samples)} images")
    found = unless_out_of_memory(lambda: cache_fidelity(teacher, samples))
    return {"missing": "dense logits of an image do not fit into memory"} if found is None else found


def _what_was_run(cache: Cache, teacher: Teacher, settings: LiveSettings) -> dict[str, Any]:
    then = cache.manifest.created_by
    return {
        "teacher": settings.against_teacher,
        "revision": settings.revision,
        "device": str(teacher.vlm.device),
        "dtype": cache.manifest.teacher.dtype,
        "attention": teacher.vlm.model.config._attn_implementation,
        "made_by": made_by(cache),
        **likeness(cache, teacher),
        "versions": {name: [then.get(name), version(name)] for name in VERSIONS},
    }


def _all_judged(found: Differences, dtype: str) -> dict[str, Any]:
    return {name: judged(difference, tolerance(name, dtype, found.scale(name))) for name, difference in found.named()}


def judged(difference: Difference, tolerated: Tolerance) -> dict[str, Any]:
    """Return an entry of `differences`. The mean and the largest difference must both be tolerated."""
    beyond = {"mean": difference.mean_beyond, "largest": difference.beyond}
    return {
        "n": difference.n,
        "mean": difference.mean,
        "largest": difference.largest,
        "beyond": beyond,
        "tolerated": asdict(tolerated),
        "worst": difference.worst,
        "agrees": beyond["mean"] <= tolerated.mean and beyond["largest"] <= tolerated.largest,
    }


def check_agreement(report: dict[str, Any]) -> None:
    """Check that the differences of a report are tolerated. Raises TeacherMismatchError."""
    if report["agrees"]:
        return
    name, entries = report["worst"], report["differences"]
    n_others = sum(not entry["agrees"] for entry in entries.values()) - 1
    more = f" ({n_others} more of {len(entries)} quantities exceed their tolerance)" if n_others else ""
    raise TeacherMismatchError(
        f"{report['teacher']} does not reproduce {report['uri']}: beyond rounding on disk, the difference of "
        f"{name.replace('_', ' ')} is {_pair(entries[name]['beyond'])}, and a teacher in {report['dtype']} may differ "
        f"by {_pair(entries[name]['tolerated'])}{more}. {_way_out(report)}"
    )


def _excess(entry: dict[str, Any]) -> float:
    """The difference as a multiple of its tolerance."""
    return max(entry["beyond"][name] / max(entry["tolerated"][name], TINY) for name in ("mean", "largest"))


def _pair(values: dict[str, float]) -> str:
    return f"{values['mean']:.2g} on average and {values['largest']:.2g} at most"


def _way_out(report: dict[str, Any]) -> str:
    same = report["same"]
    if not same["weights"]:
        return (
            f"It has other weights: the cache was made by {report['made_by']}. Name that teacher, with its --revision, "
            "or make the cache again with this one"
        )
    pixels = report["image_processor_differs_in"]
    other = [f"its image processor ({', '.join(pixels)})"] if pixels else []
    other += [f"{name} {then} then, {now} now" for name, (then, now) in report["versions"].items() if then != now]
    changed = f" Changed since then: {'; '.join(other)}." if other else ""
    return (
        f"Its weights are the ones that made the cache, {report['made_by']}; this run has {report['attention']} "
        f"attention on {report['device']}.{changed} Run it as the cache was made (--attn-implementation), or make the "
        "cache again"
    )
