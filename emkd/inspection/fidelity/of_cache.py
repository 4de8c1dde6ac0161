"""What the k logits of a cache do to matching and losses, on a few of its images with the live teacher.

`dense` computes the figures, from dense logits of the teacher and of a synthetic student: the teacher's hidden states
with noise, and a quarter of its vision tokens (`synthetic_student`). So the figures say what is lost in this cache with
students of that kind, not how a certain student will train.

Dense distances are expensive: V numbers for each pair of tokens. So only a few images are compared, and only the first
vision tokens of a large image; the report says which.

Shape legend: n tokens, d hidden size, V ids
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from emkd.inspection.fidelity.dense import Dense, Fidelity, View
from emkd.inspection.fidelity.synthetic_student import DISTANCES, NOISE, Distance, synthetic_student
from emkd.pipeline.capture import Teacher
from emkd.storage.record import Record
from emkd.trainer.data.samples import TeacherLimits
from emkd.vlm.head import LMHead
from emkd.vlm.states import States

IMAGES = 4  # samples whose first image is compared
POOLED = 4  # vision tokens of the teacher for each of the student
MOST_TOKENS, MOST_ANSWERS = 1024, 256
# Differences of logits that are summed for all distances of all images: about a minute on one core of a CPU.
BUDGET = {"cpu": 1 << 35, "cuda": 1 << 41}


@dataclass(frozen=True, kw_only=True)
class LiveSample:
    """A sample of the cache, by its sample number, and its live hidden states."""

    number: int
    states: States
    record: Record


@torch.no_grad()
def cache_fidelity(teacher: Teacher, samples: Sequence[LiveSample]) -> dict[str, Any]:
    """Return figures over the first image of each sample (at least one sample, all of them with images):

    images:    for each {sample, teacher_tokens, of, student_tokens, answers}; "of": all vision tokens of the image
    near, far: {noise, regret, vsd, rld, vlad}, as `Fidelity.as_dict`, with None instead of NaN
    """
    most = affordable(teacher, len(samples))
    found: dict[Distance, Fidelity] = {}
    images = []
    for sample in samples:
        image = sample.record.images[0]
        used = slice(image.start, image.start + min(image.count, most))
        for distance in DISTANCES:
            fidelity = _of_image(teacher, sample, used, distance)
            found[distance] = found[distance] + fidelity if distance in found else fidelity
        n_used = used.stop - used.start
        images.append(
            {
                "sample": sample.number,
                "teacher_tokens": n_used,
                "of": image.count,
                "student_tokens": n_student(n_used),
                "answers": min(len(sample.record.answer), MOST_ANSWERS),
            }
        )
    report: dict[str, Any] = {"images": images}
    for distance, fidelity in found.items():
        report[distance] = {"noise": NOISE[distance], **without_nan(fidelity.as_dict())}
    return report


def affordable(teacher: Teacher, n_images: int) -> int:
    """Vision tokens of each image: n · n / POOLED · V numbers for each distance must stay within the budget."""
    budget = BUDGET["cpu" if teacher.vlm.device.type == "cpu" else "cuda"] / n_images / len(DISTANCES)
    return max(POOLED, min(MOST_TOKENS, math.isqrt(int(budget * POOLED / teacher.vlm.n_tokens))))


def n_student(n_teacher: int) -> int:
    return max(1, n_teacher // POOLED)


def _of_image(teacher: Teacher, sample: LiveSample, used: slice, distance: Distance) -> Fidelity:
    """The fidelity of the vision tokens `used`, and of the sample's answers."""
    text, vision, predicting = sample.states.text, sample.states.vision[used], sample.states.predicting[:MOST_ANSWERS]
    own = [
        synthetic_student(states, n, distance, seed=sample.number)
        for states, n in ((text, len(text)), (vision, n_student(len(vision))), (predicting, len(predicting)))
    ]
    n_tokens = teacher.vlm.n_tokens
    head = LMHead.of(teacher.vlm.model, n_tokens)
    dense = Dense.of(view(teacher, *own), view(teacher, text, vision, predicting), head.weight[:n_tokens], head.after)
    stored = TeacherLimits(vocabulary=n_tokens, n_student_tokens=n_tokens)(sample.record).to(vision.device)
    answer = stored.answer.rows(slice(len(predicting)))
    affinities = stored.affinity_to(torch.arange(used.start, used.stop, device=vision.device), teacher.codes)
    return dense.against(stored.vision.rows(used), answer, affinities, teacher.codes)


def view(teacher: Teacher, text: torch.Tensor, vision: torch.Tensor, predicting: torch.Tensor) -> View:
    """text: [L, d];  vision: [N, d];  predicting: [A, d]. Cloned: autograd cannot save inference-mode tensors."""
    return View(
        vision=vision.clone(),
        text=text.clone(),
        vision_logits=_logits(teacher, vision),
        answer_logits=_logits(teacher, predicting),
    )


def _logits(teacher: Teacher, hidden: torch.Tensor) -> torch.Tensor:
    """float32 logits [n, V], through the LM head in the teacher's dtype."""
    parts = hidden.to(teacher.vlm.model.dtype).split(teacher.chunk)
    return torch.cat([teacher.logits(part) for part in parts])


def without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {name: without_nan(each) for name, each in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
