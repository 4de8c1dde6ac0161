"""What is saved beside the weights is saved before the first step, to a temporary folder.

transformers refuses to save a generation config that contradicts itself (a temperature without sampling), which many
published checkpoints have. Settings without effect are removed, and the log says which; the run is refused if that does
not help.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from emkd.errors import EmkdError, ModelError
from emkd.trainer.report import log
from emkd.trainer.student.student import Student

# Settings of generation that only sampling uses.
SAMPLING = ("temperature", "top_p", "min_p", "top_h", "typical_p", "top_k", "epsilon_cutoff", "eta_cutoff")


def try_saving(student: Student) -> None:
    """Save config, generation config and processor to a temporary folder. Raises ModelError if one cannot be saved."""
    where = student.vlm.path
    with TemporaryDirectory(prefix="emkd-saving-") as name:
        folder = Path(name)
        _try(student.model.config, folder, f"the config of {where}", "config.json")
        generation = getattr(student.model, "generation_config", None)
        if generation is not None:
            without_contradictions(generation, where)
            _try(generation, folder, f"the generation config of {where}", "generation_config.json")
        _try(student.processor, folder, f"the processor of {where}", "processor_config.json")


def without_contradictions(generation: Any, where: Path) -> None:
    """Remove settings of sampling from a generation config that does not sample, if it cannot be saved with them."""
    try:
        generation.validate(strict=True)
        return
    except ValueError:
        removed = [
            name for name in SAMPLING if not generation.do_sample and getattr(generation, name, None) is not None
        ]
    if not removed:
        return
    said = ", ".join(f"{name} {getattr(generation, name)}" for name in removed)
    for name in removed:
        setattr(generation, name, None)
    log(
        f"{where}/generation_config.json: {said} have no effect without do_sample: true, and cannot be saved like "
        "that; the trained student is saved without them"
    )


def _try(part: Any, folder: Path, what: str, file: str) -> None:
    try:
        part.save_pretrained(folder)
    except EmkdError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RuntimeError) as error:
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"{what} cannot be saved, and so no trained student: {line}. Correct {file} there") from error
