"""What each of several settings of a cache would cost and lose, on a user's own teacher and rows.

    cache-teacher --dry-run --worker--> measure(chooser, teacher, dataset, rows) --with_job--> the table's numbers

The bases are fitted to other rows than those that are measured. The students are synthetic, near and far, as in
`of_cache`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from emkd.errors import SampleError, UsageError
from emkd.inspection.fidelity.dense import Dense, Fidelity
from emkd.inspection.fidelity.of_cache import IMAGES, MOST_ANSWERS, affordable, n_student, view, without_nan
from emkd.inspection.fidelity.synthetic_student import DISTANCES, Distance, synthetic_student
from emkd.pipeline.basis_choice import BasisChooser, bytes_of
from emkd.pipeline.capture import Teacher
from emkd.pipeline.preflight import Estimate
from emkd.samples.dataset import Dataset
from emkd.vlm.codes import Codes
from emkd.vlm.head import LMHead
from emkd.vlm.states import States
from emkd.vlm.truncated import TruncatedLogits

MOST_TOKENS = 576
# A setting is good enough if the gradient of VSD, with the pairs found, has this cosine with the exact one.
JOINT, REGRET = 0.9, 0.01


@dataclass(frozen=True, kw_only=True)
class Setting:
    """k stored logits of a vision token, and the predicted error of codes, None for none."""

    top_k: int
    error: float | None = None

    @property
    def name(self) -> str:
        return f"top {self.top_k} alone" if self.error is None else f"error {self.error:g}"

    @property
    def flags(self) -> str:
        """The options of cache-teacher that ask for it."""
        return f"--top-k {self.top_k} --logit-error {'none' if self.error is None else f'{self.error:g}'}"


SETTINGS = (
    Setting(top_k=64),
    Setting(top_k=128),
    *(Setting(top_k=8, error=error) for error in (1.6, 0.8, 0.4, 0.2)),
)


@torch.no_grad()
def measure(chooser: BasisChooser, teacher: Teacher, dataset: Dataset, rows: Sequence[int]) -> dict[str, Any]:
    """Return {settings: [...], images: number} or {missing: reason}. Each setting is

        {name, flags, bytes: {logits, codes, total} of a vision token, logit_error, columns, near, far}

    logit_error is the root mean square error of t^ over all V. near and far are {regret, vsd_error, rld_error,
    vlad_cosine, hidden_cosine, joint_cosine}; the last two are cosines of VSD's gradient through the LM head, with the
    best pairs and with those found. A setting that cannot be had is {name, flags, missing}.
    """
    samples = _samples(teacher, dataset, rows)
    if not samples:
        return {"missing": "none of the rows that were measured has an image"}
    most = min(MOST_TOKENS, affordable(teacher, len(samples)))
    samples = [replace(states, vision=states.vision[:most]) for states in samples]
    prepared = [
        {distance: _dense(teacher, states, distance, number) for distance in DISTANCES}
        for number, states in enumerate(samples)
    ]
    found = [_measured(setting, chooser, teacher, samples, prepared) for setting in SETTINGS]
    return {"images": len(samples), "settings": [without_nan(each) for each in found]}


def _samples(teacher: Teacher, dataset: Dataset, rows: Sequence[int]) -> list[States]:
    found: list[States] = []
    for row in rows:
        try:
            encoded = teacher.encoder(dataset.sample(row))
        except SampleError:
            continue
        if encoded.n_vision and len(found) < IMAGES:
            states = teacher.states(encoded)
            # Clones: autograd cannot save tensors that inference mode made.
            found.append(
                States(
                    vision=states.vision.clone(),
                    text=states.text.clone(),
                    predicting=states.predicting[:MOST_ANSWERS].clone(),
                )
            )
    return found


def _dense(teacher: Teacher, states: States, distance: Distance, seed: int) -> Dense:
    parts = ((states.text, None), (states.vision, n_student(len(states.vision))), (states.predicting, None))
    own = [synthetic_student(hidden, n or len(hidden), distance, seed=seed) for hidden, n in parts]
    weight = LMHead.of(teacher.vlm.model, teacher.vlm.n_tokens).weight[: teacher.vlm.n_tokens]
    return Dense.of(view(teacher, *own), view(teacher, states.text, states.vision, states.predicting), weight)


def _measured(
    setting: Setting,
    chooser: BasisChooser,
    teacher: Teacher,
    samples: Sequence[States],
    prepared: Sequence[dict[Distance, Dense]],
) -> dict[str, Any]:
    named = {"name": setting.name, "flags": setting.flags}
    try:
        return {**named, **_figures_of(setting, chooser, teacher, samples, prepared)}
    except (UsageError, SampleError) as error:  # too many columns, or codes that do not fit into 16 bits
        return {**named, "missing": str(error)}


def _figures_of(
    setting: Setting,
    chooser: BasisChooser,
    teacher: Teacher,
    samples: Sequence[States],
    prepared: Sequence[dict[Distance, Dense]],
) -> dict[str, Any]:
    cut = None if setting.error is None else chooser.cut(setting.error)
    codes = None if cut is None else Codes(chooser.basis(cut), teacher.vlm.device)
    logits, squared, n = 0, 0.0, 0
    fidelity: dict[Distance, Fidelity] = {}
    for states, dense in zip(samples, prepared, strict=True):
        vision = _cut(teacher, states.vision, setting.top_k, codes)
        answer = _cut(teacher, states.predicting, teacher.settings.answer_top_k, codes)
        logits += bytes_of(vision.top_logits(), chooser.manifest)
        squared += _squared_error(vision, dense["near"].teacher.vision_logits, codes)
        n += len(states.vision)
        for distance in DISTANCES:
            one = dense[distance].against(vision, answer, codes=codes)
            fidelity[distance] = fidelity[distance] + one if distance in fidelity else one
    of_codes = 0.0 if cut is None else chooser.code_bytes(cut)
    return {
        "bytes": {"logits": logits / n, "codes": of_codes, "total": logits / n + of_codes},
        "logit_error": (squared / n) ** 0.5,
        "columns": 0 if cut is None else cut.n_columns,
        **{distance: _figures(each, codes) for distance, each in fidelity.items()},
    }


def _cut(teacher: Teacher, hidden: torch.Tensor, k: int, codes: Codes | None) -> TruncatedLogits:
    top = teacher.top_k(hidden, k)
    return replace(top.map(torch.clone), codes=None if codes is None else codes.encode(hidden))


def _squared_error(cut: TruncatedLogits, exact: torch.Tensor, codes: Codes | None) -> float:
    """Sum over tokens of the mean square error of t^; without codes, the logits that are not stored are their mean."""
    if codes is not None and cut.codes is not None:
        read = codes.logits(cut.codes)
    else:
        mean = torch.zeros(len(exact), 1) if cut.tail_mean is None else cut.tail_mean[:, None]
        read = mean.to(exact.device).expand_as(exact).scatter(1, cut.ids, cut.logits)
    return float((read - exact).double().square().mean(dim=1).sum())


def _figures(fidelity: Fidelity, codes: Codes | None) -> dict[str, float]:
    tail = "uniform" if codes is None else "codes"
    return {
        "regret": fidelity.assignment.regret,
        "vsd_error": fidelity.vsd[tail].loss_error if tail in fidelity.vsd else fidelity.vsd["uniform"].loss_error,
        "rld_error": fidelity.rld[tail].loss_error if tail in fidelity.rld else fidelity.rld["uniform"].loss_error,
        "vlad_cosine": fidelity.vlad.gradient_cosine,
        "hidden_cosine": fidelity.hidden.gradient_cosine,
        "joint_cosine": fidelity.joint.gradient_cosine,
    }


def with_job(estimate: Estimate) -> dict[str, Any]:
    """Return what the estimate's study found, with the bytes of the whole job for each setting, and an advice."""
    found: dict[str, Any] = estimate.study
    if "missing" in found:
        return found
    rest = estimate.n_bytes - estimate.vision_tokens * estimate.logits_and_codes
    settings = [
        {**each, "job_bytes": round(rest + estimate.vision_tokens * each["bytes"]["total"])}
        if "bytes" in each
        else each
        for each in found["settings"]
    ]
    return {**found, "settings": settings, "advice": advice(settings)}


def advice(settings: Sequence[dict[str, Any]]) -> str:
    """Say which setting to take, and why."""
    measured = [each for each in settings if "missing" not in each and _joint(each) is not None]
    if not measured:
        return "No setting could be measured."
    good = [each for each in measured if _joint(each) >= JOINT and _regret(each) <= REGRET]
    if good:
        best = min(good, key=lambda each: each["bytes"]["total"])
        why = (
            f"it is the smallest with which pairs and gradients stay close to the exact ones (regret at most "
            f"{REGRET:g}, joint cosine at least {JOINT:g}, of both students)"
        )
    else:
        best = max(measured, key=_joint)
        why = (
            f"none keeps pairs and gradients close to the exact ones (regret at most {REGRET:g}, joint cosine at least "
            f"{JOINT:g}), and this one comes closest; a smaller --logit-error comes closer"
        )
    return f"Take {best['flags']}: {why}."


def _joint(setting: dict[str, Any]) -> Any:
    values = [setting[distance]["joint_cosine"] for distance in DISTANCES]
    return None if None in values else min(values)


def _regret(setting: dict[str, Any]) -> float:
    return max(setting[distance]["regret"] for distance in DISTANCES)
