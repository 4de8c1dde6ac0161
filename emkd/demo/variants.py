"""The two recipes of the demonstration's students, and the losses that each variant overrides.

The recipes' numbers were chosen on the validation scenes (benchmarks/demo/hyperparameters.py), never on the test
scenes.
"""

from typing import Any

_TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 30,
    "weight_decay": 0.05,
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "max_grad_norm": 1.0,
    "logging_steps": 25,
    "save_strategy": "no",
}

# Phase 1, without a teacher: the copy of the teacher learns to read pooled tokens of a stretched image.
ALIGN: dict[str, Any] = {
    "losses": {"alpha": 1.0, "beta": 0.0, "gamma": 0.0},
    "student": {"vision_pool": 2},
    "training": {"max_steps": 150, **_TRAINING},
}

# Phase 2, from the teacher's cache. beta is 0.25 in the paper.
RECIPE: dict[str, Any] = {
    "losses": {"alpha": 0.5, "beta": 1.0, "gamma": 25.0},
    "student": {"vision_pool": 2},
    "training": {"max_steps": 300, **_TRAINING},
    "window": 2,
}

SFT = {"alpha": 1.0, "beta": 0.0, "gamma": 0.0}

VARIANTS: dict[str, dict[str, Any]] = {
    "sft": SFT,
    "rld": {"beta": 0.0, "gamma": 0.0},
    "emkd": {},
    "emkd-random": {"matching": "random"},
}

# The matching's costs: what is compared, and how many of the teacher's logits count (None for all).
COSTS: dict[str, dict[str, Any]] = {
    "logits": {"cost": "logits", "cost_top_k": None},
    "log-probabilities": {"cost": "log_probabilities", "cost_top_k": None},
    "logits-top-8": {"cost": "logits", "cost_top_k": 8},
    "log-probabilities-top-8": {"cost": "log_probabilities", "cost_top_k": 8},
}

DEFAULT_COST = "log-probabilities"  # the one of COSTS that a recipe has if it names none

ABLATIONS: dict[str, dict[str, Any]] = {
    "sft+vlad": {"alpha": 1.0, "beta": 0.0},
    "sft+vsd": {"alpha": 1.0, "gamma": 0.0},
    "sft+vsd+vlad": {"alpha": 1.0},
    "rld+vlad": {"beta": 0.0},
    "rld+vsd": {"gamma": 0.0},
    "emkd-pooled": {"matching": "pooled"},
    **{f"emkd-{name}": cost for name, cost in COSTS.items() if name != DEFAULT_COST},
}
