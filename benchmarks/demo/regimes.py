"""When distillation helps on the demonstration's task and when it does not, on the validation scenes.

    python -m benchmarks.demo.regimes DEMO_OUT --seeds 3

DEMO_OUT is a folder that `emkd demo` made; the script uses its teacher. Three regimes, each with SFT, RLD and EM-KD:

    noisy    the demonstration's own: 100 scenes, a quarter of the answers wrong, the teacher's language model
    clean    the same scenes with all answers right
    nothing  noisy labels, and a student whose projector and language model start from random weights (twice the steps)

Writes benchmarks/results/demo_regimes.json.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.common.provenance import RESULTS, provenance, write_results
from emkd.demo.models import new_processor, new_teacher, save_model
from emkd.demo.run import DATA_SEED, TRAIN_SCENES, WRONG_ANSWERS, cache_demo, train_one
from emkd.demo.scenes import write_scenes
from emkd.demo.threads import one_quiet_thread
from emkd.demo.variants import RECIPE, VARIANTS
from emkd.trainer import evaluate_checkpoint
from emkd.vlm import load

REGIMES: dict[str, dict[str, Any]] = {
    "noisy": {"wrong_answers": WRONG_ANSWERS},
    "clean": {"wrong_answers": 0.0},
    "nothing": {"wrong_answers": WRONG_ANSWERS, "from_nothing": True},
}


def prepare(demo: Path, folder: Path, wrong_answers: float, from_nothing: bool = False) -> None:
    """Make a folder like DEMO_OUT with the regime's data, cache and initial student."""
    shutil.copytree(demo / "teacher", folder / "teacher")
    write_scenes(folder / "data" / "train.parquet", TRAIN_SCENES, "train", DATA_SEED, wrong_answers=wrong_answers)
    cache_demo(folder)
    if not from_nothing:
        shutil.copytree(demo / "student-init", folder / "student-init")
        return
    teacher, student = load(str(demo / "teacher")).model, new_teacher(seed=7)
    student.model.vision_tower.load_state_dict(teacher.model.vision_tower.state_dict())
    save_model(student, new_processor(), folder / "student-init")


def measure(demo: Path, folder: Path, variant: str, seed: int, from_nothing: bool = False) -> float:
    """Train one student and return its accuracy on the validation scenes."""
    output = folder / "students" / f"{variant}-{seed}"
    steps = RECIPE["training"]["max_steps"] * (2 if from_nothing else 1)
    train_one(folder, output, VARIANTS[variant], seed, **{"training.max_steps": steps})
    return evaluate_checkpoint(str(output), str(demo / "data" / "validation.parquet"))["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    origin = provenance()
    results: dict[str, dict[str, list[float]]] = {}
    with one_quiet_thread(), tempfile.TemporaryDirectory(prefix="emkd-regimes-") as scratch:
        for regime, options in REGIMES.items():
            folder = Path(scratch) / regime
            prepare(arguments.demo, folder, **options)
            nothing = bool(options.get("from_nothing"))
            results[regime] = {
                variant: [measure(arguments.demo, folder, variant, seed, nothing) for seed in range(arguments.seeds)]
                for variant in VARIANTS
            }
            print(regime, {name: round(mean(found), 4) for name, found in results[regime].items()}, flush=True)
    write_results(RESULTS / "demo_regimes.json", {**origin, "split": "validation", "accuracy": results})


if __name__ == "__main__":
    main()
