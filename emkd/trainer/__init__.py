"""Train a student from a cache, without a teacher and, on one worker, without Ray.

The modules and packages, in reading order; each imports only from those below it:

    train       one process, or several that Ray Train starts
    workers     the processes that Ray Train starts
    run         one process, from its first check to the saved student
    loop/       transformers.Trainer with the losses of EM-KD: resume, checkpoints, log lines, evaluation
    objective/  what a step minimizes
    data/       what a run trains on, and in which order
    student/    the model that is trained: loading, parameters, LoRA, model card
    recipe/     what the user chooses
    matching/   which vision tokens of student and teacher are paired
    losses/     the mathematics: divergences, the LM head in chunks, weights
    report      what a run says
    display     a bar and a table on a terminal, lines elsewhere
"""

from emkd.trainer.recipe.recipe import Recipe, load_recipe, make_recipe, with_flags
from emkd.trainer.recipe.settings import TrainSettings
from emkd.trainer.run import evaluate_checkpoint
from emkd.trainer.train import train_student

__all__ = [
    "Recipe",
    "TrainSettings",
    "evaluate_checkpoint",
    "load_recipe",
    "make_recipe",
    "train_student",
    "with_flags",
]
