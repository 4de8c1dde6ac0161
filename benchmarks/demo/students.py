"""Students of a demonstration's folder that are trained, judged and deleted."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from emkd.demo.regime import DEMO, Regime
from emkd.demo.run import evaluate, train_one


def accuracy(
    demo: Path, losses: dict[str, Any], seed: int, *, split: str, regime: Regime = DEMO, **flags: Any
) -> float:
    """Return the accuracy of a student that is trained as `train_one` does.

    demo: a folder that `emkd demo` made, or one with its data, cache and student-init
    """
    folder = Path(tempfile.mkdtemp(prefix="emkd-student-"))
    try:
        train_one(demo, folder, losses, seed, regime, **flags)
        return evaluate(folder, demo, split)["accuracy"]
    finally:
        shutil.rmtree(folder)
