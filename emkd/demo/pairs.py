"""Do matched tokens belong together? The share of pairs that show the same content, and that lie in the same cell.

Scenes know what each of their cells holds, so matchings can be judged without training: on the cache's first rows, with
a student before and after it was trained. The code that matches is the trainer's.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from emkd.demo.places import contents, places
from emkd.demo.scenes import Scenes
from emkd.demo.variants import COSTS
from emkd.errors import UsageError
from emkd.samples.dataset import Dataset
from emkd.samples.encode import Encoder
from emkd.storage.cache import Cache
from emkd.trainer.data.samples import TeacherLimits
from emkd.trainer.matching.cost import Cost
from emkd.trainer.matching.match import Pairs, VisionTokens, match
from emkd.vlm import load
from emkd.vlm.codes import Codes
from emkd.vlm.forward import collate, last_hidden_state, to_model
from emkd.vlm.head import LMHead

Shares = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What the vision tokens of a model show, by scene: cells [t] and contents [n, t] (places.py)."""

    cells: NDArray[np.int64]
    contents: NDArray[np.int64]

    @classmethod
    def of(cls, scenes: Scenes, *, pads: bool, pool: int = 1) -> "Shown":
        cells = places(pads=pads, pool=pool)
        return cls(cells=cells, contents=contents(scenes.labels, cells))


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The vision tokens of one scene in both models, ready to be matched, and the student's head."""

    tokens: VisionTokens
    head: LMHead
    codes: Codes | None

    def pairs(self, matching: str) -> Pairs:
        """Return the pairs of one of COSTS, or of "random" or "pooled"."""
        if matching in ("random", "pooled"):
            return match(matching, [self.tokens], self.head)[0]  # type: ignore[arg-type]
        chosen = COSTS[matching]
        cost = Cost(space=chosen["cost"], top_k=chosen["cost_top_k"])
        return match("logits", [self.tokens], self.head, cost=cost, codes=self.codes)[0]


@torch.no_grad()
def open_scenes(student: Path, data: Path, cache_folder: Path, n: int) -> list[Scene]:
    """Return the first n scenes of data and cache, seen by a student that pools."""
    vlm, cache, dataset = load(str(student)), Cache.open(cache_folder), Dataset(str(data))
    vlm.model.eval()
    encoder = Encoder(vlm.processor, vlm.image_token_id, clock=cache.manifest.clock)
    limits = TeacherLimits(vocabulary=cache.manifest.vocabulary_size, n_student_tokens=vlm.n_tokens)
    codes = None if cache.basis is None else Codes(cache.basis, "cpu")
    numbers = {int(row): number for number, row in enumerate(cache.sample_rows)}
    found = []
    lacking = [row for row in range(n) if row not in numbers]
    if lacking:
        raise UsageError(f"{cache_folder} has no sample of row {lacking[0]} of {data}; make the cache of this file")
    for row in range(n):
        encoded, teacher = encoder(dataset.sample(row)), limits(cache.record(numbers[row]))
        hidden = last_hidden_state(vlm.model, to_model(collate([encoded], 0), vlm.model))[0].float()
        tokens = VisionTokens(
            hidden=hidden[encoded.vision_mask],
            teacher=teacher.vision,
            images=encoded.images,
            teacher_images=teacher.images,
            seed=str(row),
        )
        found.append(Scene(tokens=tokens, head=LMHead.of(vlm.model, vlm.n_tokens), codes=codes))
    return found


def shares(found: list[Scene], student: Shown, teacher: Shown, matchings: tuple[str, ...]) -> Shares:
    """Return {matching: {content, place}}: shares of all pairs of all scenes, 0 to 1."""
    return {matching: _share([scene.pairs(matching) for scene in found], student, teacher) for matching in matchings}


def _share(pairs: list[Pairs], student: Shown, teacher: Shown) -> dict[str, float]:
    same: dict[str, Any] = {"content": [], "place": []}
    for number, found in enumerate(pairs):
        own, theirs = (part.numpy() for part in found)
        same["content"].append(student.contents[number, own] == teacher.contents[number, theirs])
        same["place"].append(student.cells[own] == teacher.cells[theirs])
    return {name: float(np.concatenate(parts).mean()) for name, parts in same.items()}
