"""What cutting the teacher to k of its V logits changes in the assignment, the losses and their gradients.

    python -m benchmarks.fidelity.cut_logits DEMO_OUT

DEMO_OUT is a folder that `emkd demo` made. Its teacher is cut at k = 2, 4, 8, 16 and all 23, on validation scenes, for
the student before ("untrained") and after phase 2. Synthetic logits of 151,936 ids (common/synthetic_logits.py; 144
student and 729 teacher tokens) are cut at k = 8 to 128, for a synthetic student near the teacher and one far from it
(emkd/inspection/fidelity/synthetic_student.py). One draw; `--seeds` takes means over several.
emkd/inspection/fidelity/dense.py defines the figures.

Prints tables. The default tail is the one with the higher cosine of the gradient, averaged over both distances and
over VSD and RLD, on the synthetic logits at k = 64.
"""

import argparse
from collections.abc import Sequence
from functools import reduce
from operator import add
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.common.synthetic_logits import Synthetic, answers, synthetic, text_states
from emkd.inspection.fidelity.comparison import Comparison
from emkd.inspection.fidelity.dense import TAILS, Dense, View, vlad_comparison
from emkd.inspection.fidelity.synthetic_student import DISTANCES, NOISE, Distance, synthetic_student
from emkd.pipeline.topk import top_k
from emkd.samples.dataset import Dataset
from emkd.samples.encode import Encoder
from emkd.storage.precision import decode_affinity, encode_affinity
from emkd.vlm import load
from emkd.vlm.affinity import affinity
from emkd.vlm.forward import collate, last_hidden_state, lm_logits, to_model
from emkd.vlm.loading import VisionLanguageModel
from emkd.vlm.truncated import TruncatedLogits, truncated

V, TILE, N_STUDENT, N_ANSWERS, N_TEXT = 151_936, (27, 27), 144, 48, 48
SYNTHETIC_K = (8, 16, 32, 64, 128)
DEMO_K = (2, 4, 8, 16, 23)
CHOICE_K, DEMO_CHOICE_K = 64, 8
SEEDS = (0,)
SCENES = 25

Measured = list[dict[str, Any]]


def cut(logits: torch.Tensor, k: int) -> TruncatedLogits:
    """Return what a cache of float32 logits keeps of dense logits [n, V]."""
    top = top_k(logits, k)
    return truncated(top.ids, top.logits, top.tail_logsumexp, logits.shape[1], top.tail_mean)


def int8(cosines: torch.Tensor) -> torch.Tensor:
    """Round affinities as a cache does."""
    return torch.from_numpy(decode_affinity(encode_affinity(cosines.numpy(), "int8"), "int8"))


def rounding(dense: Dense) -> Comparison:
    """Return what rounding the affinity to 8 bits changes in VLAD, at the best pairs."""
    exact = affinity(dense.teacher.text, dense.teacher.vision)
    return vlad_comparison(dense.student.text, dense.student.vision, exact, dense.best, dense.best, int8(exact))


def student_view(teacher: Synthetic, answer: Synthetic, text: torch.Tensor, distance: Distance, seed: int) -> View:
    """Return the view of a synthetic student that uses the teacher's LM head."""
    vision = synthetic_student(teacher.hidden, N_STUDENT, distance, seed)
    predicting = synthetic_student(answer.hidden, len(answer.hidden), distance, seed + 1)
    return View(
        vision=vision,
        text=synthetic_student(text, len(text), distance, seed + 2),
        vision_logits=Synthetic(hidden=vision, head=teacher.head).logits(),
        answer_logits=Synthetic(hidden=predicting, head=teacher.head).logits(),
    )


def on_synthetic(seeds: Sequence[int], vocabulary: int = V) -> Measured:
    """Return one entry for each distance, k and seed."""
    found = []
    for seed in seeds:
        made = synthetic(vocabulary, [TILE], seed=seed)
        answer, text = answers(made, N_ANSWERS, seed + 100), text_states(made, N_TEXT, seed + 200)
        teacher = View(vision=made.hidden, text=text, vision_logits=made.logits(), answer_logits=answer.logits())
        largest = made.cut(max(SYNTHETIC_K)), answer.cut(max(SYNTHETIC_K))
        for distance in DISTANCES:
            dense = Dense.of(student_view(made, answer, text, distance, seed), teacher)
            of = {"student": distance, "noise": NOISE[distance], "seed": seed, "vlad_int8": rounding(dense).as_dict()}
            for k in SYNTHETIC_K:
                vision, predicting = (part.smaller(k) for part in largest)
                mass = float(vision.retained_mass().mean())
                found.append({**of, "k": k, "retained_mass": mass, **dense.against(vision, predicting).as_dict()})
    return found


class Scenes:
    """Validation scenes in a model of the demonstration."""

    def __init__(self, demo: Path, n: int) -> None:
        self.dataset = Dataset(str(demo / "data" / "validation.parquet"))
        self.n = n

    @torch.no_grad()
    def views(self, vlm: VisionLanguageModel) -> list[View]:
        vlm.model.eval()
        return [self._view(vlm, Encoder(vlm.processor, vlm.image_token_id), row) for row in range(self.n)]

    def _view(self, vlm: VisionLanguageModel, encoder: Encoder, row: int) -> View:
        encoded = encoder(self.dataset.sample(row))
        hidden = last_hidden_state(vlm.model, to_model(collate([encoded], 0), vlm.model))[0].float()
        vision = hidden[encoded.vision_mask]
        return View(
            vision=vision,
            text=hidden[encoded.text_positions],
            vision_logits=lm_logits(vlm.model, vision, vlm.n_tokens),
            answer_logits=lm_logits(vlm.model, hidden[encoded.predicting_positions], vlm.n_tokens),
        )


def on_demo(demo: Path, n_scenes: int = SCENES) -> Measured:
    """Return one entry for each student and k, over all scenes."""
    untrained, trained = load(str(demo / "student-init")), load(str(demo / "students" / "emkd-0"))
    scenes = Scenes(demo, n_scenes)
    teacher = scenes.views(load(str(demo / "teacher")))
    found = []
    for name, student in {"trained": trained, "untrained": untrained}.items():
        images = [Dense.of(*pair) for pair in zip(scenes.views(student), teacher, strict=True)]
        of = {
            "student": name,
            "scenes": n_scenes,
            "vlad_int8": reduce(add, (rounding(image) for image in images)).as_dict(),
        }
        for k in DEMO_K:
            cuts = [(cut(image.teacher.vision_logits, k), cut(image.teacher.answer_logits, k)) for image in images]
            mass = mean(float(vision.retained_mass().mean()) for vision, _ in cuts)
            fidelity = reduce(add, (image.against(*pair) for image, pair in zip(images, cuts, strict=True)))
            found.append({**of, "k": k, "retained_mass": mass, **fidelity.as_dict()})
    return found


def average(entries: Measured, *path: str) -> float:
    """Return the mean over entries of the number at a path of keys."""
    numbers = []
    for entry in entries:
        for key in path:
            entry = entry[key]
        numbers.append(float(entry))  # type: ignore[arg-type]
    return mean(numbers)


def choice(entries: Measured, k: int) -> dict[str, Any]:
    """Return the cosine of the gradient by tail and loss, averaged over both students, its mean, and the best tail."""
    at = [entry for entry in entries if entry["k"] == k]
    found = {tail: {loss: average(at, loss, tail, "gradient_cosine") for loss in ("vsd", "rld")} for tail in TAILS}
    means = {tail: mean(losses.values()) for tail, losses in found.items()}
    return {"k": k, "gradient_cosine": found, "mean": means, "tail": max(means, key=lambda tail: means[tail])}


def measure(demo: Path, seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """Return the figures of every run, and by name those that README and docs show."""
    made, real = on_synthetic(seeds), on_demo(demo)
    chosen = choice(made, CHOICE_K)
    return {
        "synthetic": made,
        "demo": real,
        "choice": chosen,
        "choice_on_demo": choice(real, DEMO_CHOICE_K),
        "regret": {
            name: average([entry for entry in made if (entry["student"], entry["k"]) == (name, CHOICE_K)], "regret")
            for name in DISTANCES
        },
        "loss_error": _by_loss(made, chosen["tail"], "loss_error"),
        "gradient_cosine": _by_loss(made, chosen["tail"], "gradient_cosine"),
    }


def _by_loss(entries: Measured, tail: str, figure: str) -> dict[str, float]:
    """Return {"vsd near": number, ...} with the chosen tail, at the k at which it was chosen."""
    paths = {"vsd": ("vsd", tail), "rld": ("rld", tail), "vlad": ("vlad",)}
    return {
        f"{loss} {name}": average([e for e in entries if (e["student"], e["k"]) == (name, CHOICE_K)], *path, figure)
        for loss, path in paths.items()
        for name in DISTANCES
    }


def show(result: dict[str, Any]) -> str:
    """Return tables in Markdown."""
    return "\n\n".join(
        [
            "synthetic logits\n\n" + _table(result["synthetic"]),
            "the demonstration's teacher, V = 23\n\n" + _table(result["demo"]),
            "synthetic, k = 64: the default is " + _choice(result["choice"]),
            "the demonstration, k = 8: the default would be " + _choice(result["choice_on_demo"]),
        ]
    )


def _choice(chosen: dict[str, Any]) -> str:
    lines = [chosen["tail"], "", "cosine of the gradient | VSD | RLD | mean", "---|---|---|---"]
    for tail, cosines in chosen["gradient_cosine"].items():
        lines.append(f"{tail} | {cosines['vsd']:.3f} | {cosines['rld']:.3f} | {chosen['mean'][tail]:.3f}")
    return "\n".join(lines)


def _table(entries: Measured) -> str:
    lines = ["losses: relative error of the loss / cosine / norm ratio of the gradient, against the dense teacher", ""]
    names = [f"{loss}, {tail}" for loss in ("VSD", "RLD") for tail in TAILS]
    lines += [" | ".join(["student", "k", "mass", "regret", *names, "VLAD", "VLAD, int8"]), "|".join(["---"] * 10)]
    for student, k in dict.fromkeys((entry["student"], entry["k"]) for entry in entries):
        same = [entry for entry in entries if (entry["student"], entry["k"]) == (student, k)]
        cells = [_figures(same, loss, tail) for loss in ("vsd", "rld") for tail in TAILS]
        cells += [_figures(same, "vlad"), _figures(same, "vlad_int8")]
        mass, regret = average(same, "retained_mass"), average(same, "regret")
        lines.append(" | ".join([student, str(k), f"{mass:.2f}", f"{regret:.4f}", *cells]))
    return "\n".join(lines)


def _figures(entries: Measured, *path: str) -> str:
    error, cosine, ratio = (
        average(entries, *path, name) for name in ("loss_error", "gradient_cosine", "gradient_norm_ratio")
    )
    return f"{error:+.3f} / {cosine:.3f} / {ratio:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(show(measure(arguments.demo, arguments.seeds)))


if __name__ == "__main__":
    main()
