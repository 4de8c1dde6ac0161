"""The recipe of the demonstration's students, and the loss weights that each variant overrides.

The recipe's numbers were chosen on the validation scenes (benchmarks/demo/hyperparameters.py), never on the test
scenes.
"""

from typing import Any

RECIPE: dict[str, Any] = {
    "losses": {"alpha": 0.5, "beta": 0.25, "gamma": 25.0},  # the paper's
    "student": {"vision_pool": 2, "freeze": ["model.vision_tower"]},
    "training": {
        "max_steps": 75,
        "per_device_train_batch_size": 16,
        "learning_rate": 8e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 30,
        "weight_decay": 0.05,
        "adam_beta1": 0.9,
        "adam_beta2": 0.98,
        "max_grad_norm": 1.0,
        "logging_steps": 25,
        "save_strategy": "no",
    },
    "window": 2,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "sft": {"alpha": 1.0, "beta": 0.0, "gamma": 0.0},
    "rld": {"beta": 0.0, "gamma": 0.0},
    "emkd": {},
}

ABLATIONS: dict[str, dict[str, Any]] = {
    "sft+vsd": {"alpha": 1.0, "gamma": 0.0},
    "sft+vlad": {"alpha": 1.0, "beta": 0.0},
    "rld+vsd": {"gamma": 0.0},
    "rld+vlad": {"beta": 0.0},
    "emkd-pooled": {"matching": "pooled"},
    "emkd-random": {"matching": "random"},
}
