"""What each of several settings of a cache would cost and lose, on a user's own teacher and rows.

    cache-teacher --dry-run --worker--> measure(chooser, teacher, dataset, rows) --with_job--> the table's numbers

The bases are fitted to other rows than those that are measured. The students are synthetic, near and far, as in
`of_cache`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from emkd.errors import SampleError, UsageError
from emkd.inspection.fidelity.dense import Dense, Fidelity, View
from emkd.inspection.fidelity.of_cache import IMAGES, MOST_ANSWERS, affordable, n_student, view, without_nan
from emkd.inspection.fidelity.synthetic_student import DISTANCES, Distance, synthetic_student
from emkd.pipeline.basis_choice import BasisChooser, bytes_of
from emkd.pipeline.capture import Teacher
from emkd.pipeline.out_of_memory import unless_out_of_memory
from emkd.pipeline.preflight import Estimate
from emkd.samples.dataset import Dataset
from emkd.storage.manifest.manifest import Manifest
from emkd.trainer.losses.divergence import Tail
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
    """Return {settings: [...], images: number, asked_bytes} or {missing: reason}. Each setting is

        {name, flags, bytes: {logits, codes, total} of a vision token, basis_bytes, logit_error, columns, near, far}

    logit_error is the root mean square error of t^ over all V. near and far are {regret, vsd_error, rld_error,
    vlad_cosine, hidden_cosine, joint_cosine}; the last two are cosines of VSD's gradient through the LM head, with the
    best pairs and with those found. A setting that cannot be had is {name, flags, missing}. asked_bytes are those of
    the logits and tails that were asked for.
    """
    found = {setting: Found.of(setting, chooser, teacher) for setting in SETTINGS}
    n_images = 0
    for row in rows:
        if n_images == IMAGES:
            break
        states = unless_out_of_memory(partial(_states, teacher, dataset, row))
        if states is not None and len(states.vision):
            done = unless_out_of_memory(partial(_add_image, list(found.values()), teacher, chooser, states, n_images))
            n_images += done is not None
    if not n_images:
        return {"missing": "none of the rows that were measured has an image whose dense logits fit into memory"}
    settings = [without_nan(each.as_dict()) for each in found.values()]
    return {"images": n_images, "asked_bytes": chooser.top_bytes, "settings": settings}


@dataclass
class Found:
    """What is known of a setting so far. missing: why it cannot be had, "" if it can"""

    setting: Setting
    codes: Codes | None = None
    columns: int = 0
    code_bytes: float = 0.0
    basis_bytes: int = 0
    missing: str = ""
    logit_bytes: int = 0
    squared: float = 0.0
    n_tokens: int = 0
    fidelity: dict[Distance, Fidelity] = field(default_factory=dict)

    @classmethod
    def of(cls, setting: Setting, chooser: BasisChooser, teacher: Teacher) -> "Found":
        if setting.error is None:
            return cls(setting)
        try:
            cut = chooser.cut(setting.error)
        except UsageError as error:  # too many columns
            return cls(setting, missing=str(error))
        basis = chooser.basis(cut)
        return cls(
            setting,
            codes=Codes(basis, teacher.vlm.device),
            columns=cut.n_columns,
            code_bytes=chooser.code_bytes(cut),
            basis_bytes=basis.n_bytes,
        )

    def add(self, dense: dict[Distance, Dense], states: States, teacher: Teacher, manifest: Manifest) -> None:
        """Add an image. A setting whose codes do not fit into 16 bits cannot be had."""
        try:
            vision = _cut(teacher, states.vision, self.setting.top_k, self.codes)
            answer = _cut(teacher, states.predicting, teacher.settings.answer_top_k, self.codes)
        except SampleError as error:
            self.missing = str(error)
            return
        self.logit_bytes += bytes_of(vision.top_logits(), manifest)
        self.squared += _squared_error(vision, dense["near"].teacher.vision_logits, self.codes)
        self.n_tokens += len(states.vision)
        for distance, exact in dense.items():
            one = exact.against(vision, answer, codes=self.codes)
            self.fidelity[distance] = self.fidelity[distance] + one if distance in self.fidelity else one

    def as_dict(self) -> dict[str, Any]:
        named = {"name": self.setting.name, "flags": self.setting.flags}
        if self.missing:
            return {**named, "missing": self.missing}
        logits = self.logit_bytes / self.n_tokens
        return {
            **named,
            "bytes": {"logits": logits, "codes": self.code_bytes, "total": logits + self.code_bytes},
            "basis_bytes": self.basis_bytes,
            "logit_error": (self.squared / self.n_tokens) ** 0.5,
            "columns": self.columns,
            **{distance: _figures(each, self.codes) for distance, each in self.fidelity.items()},
        }


def _states(teacher: Teacher, dataset: Dataset, row: int) -> States | None:
    """The states of a row, None if the job would skip it."""
    try:
        states = teacher.states(teacher.encoder(dataset.sample(row)))
        teacher.logits(torch.cat([states.vision[:1], states.predicting[:1]]))
    except SampleError:
        return None
    if not all(bool(part.isfinite().all()) for part in (states.vision, states.text, states.predicting)):
        return None
    # Clones: autograd cannot save tensors that inference mode made.
    return States(
        vision=states.vision[: min(MOST_TOKENS, affordable(teacher, IMAGES))].clone(),
        text=states.text.clone(),
        predicting=states.predicting[:MOST_ANSWERS].clone(),
    )


def _add_image(found: Sequence[Found], teacher: Teacher, chooser: BasisChooser, states: States, seed: int) -> bool:
    """Add an image to all settings that can be had. Its dense logits are in memory only meanwhile."""
    theirs = view(teacher, states.text, states.vision, states.predicting)
    dense = {distance: _dense(teacher, states, theirs, distance, seed) for distance in DISTANCES}
    for each in found:
        if not each.missing:
            each.add(dense, states, teacher, chooser.manifest)
    return True


def _dense(teacher: Teacher, states: States, theirs: View, distance: Distance, seed: int) -> Dense:
    parts = ((states.text, None), (states.vision, n_student(len(states.vision))), (states.predicting, None))
    own = [synthetic_student(hidden, n or len(hidden), distance, seed=seed) for hidden, n in parts]
    head = LMHead.of(teacher.vlm.model, teacher.vlm.n_tokens)
    return Dense.of(view(teacher, *own), theirs, head.weight[: head.n_tokens], head.after)


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
    tail: Tail = "uniform" if codes is None else "codes"
    return {
        "regret": fidelity.assignment.regret,
        "vsd_error": fidelity.vsd[tail].loss_error,
        "rld_error": fidelity.rld[tail].loss_error,
        "vlad_cosine": fidelity.vlad.gradient_cosine,
        "hidden_cosine": fidelity.hidden.gradient_cosine,
        "joint_cosine": fidelity.joint.gradient_cosine,
    }


def with_job(estimate: Estimate) -> dict[str, Any]:
    """Return what the estimate's study found, with the bytes of the whole job for each setting, and an advice.

    Affinities, answers and text take what they take in the job that was asked for.
    """
    found: dict[str, Any] = estimate.study
    if "missing" in found:
        return found
    asked = estimate.logits_and_codes or found["asked_bytes"]
    rest = estimate.n_bytes - estimate.basis_bytes - estimate.vision_tokens * asked

    def job_bytes(each: dict[str, Any]) -> int:
        return round(rest + each["basis_bytes"] + estimate.vision_tokens * each["bytes"]["total"])

    settings = [{**each, "job_bytes": job_bytes(each)} if "bytes" in each else each for each in found["settings"]]
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
