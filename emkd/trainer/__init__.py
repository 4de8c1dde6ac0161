"""The student's way from the cache; no teacher and, on one worker, no Ray.

Reading order: run.py (the whole run), settings.py, recipe.py and arguments.py (what decides it), checks.py (before it
starts), source.py and selection.py (what is trained on), stream.py (cache and dataset to batches), order.py (which
sample next, on which rank), student.py (the model; modules.py, lora.py, card.py), truncated.py (the teacher's logits
with their tails), matching.py (cost.py, assignment.py), losses.py (reverse_kl.py), objective.py (all losses of a step;
parts.py says which tokens have which, chunked.py takes them through the LM head), distillation.py (the Trainer),
checkpoints.py, meter.py and report.py (what is told), evaluation.py, launch.py (several workers).
"""

from emkd.trainer.recipe import Recipe, load_recipe, make_recipe, with_flags
from emkd.trainer.run import evaluate_checkpoint, train_student
from emkd.trainer.settings import TrainSettings

__all__ = [
    "Recipe",
    "TrainSettings",
    "evaluate_checkpoint",
    "load_recipe",
    "make_recipe",
    "train_student",
    "with_flags",
]
