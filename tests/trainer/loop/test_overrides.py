"""transformers.Trainer still has the methods that DistillationTrainer overrides, and calls them as we expect.

Half of them are private, and may change with any minor version of transformers. If this fails after an upgrade, read
the new method, adapt emkd/trainer/loop/trainer.py, and only then change the expectation here.
"""

import inspect
import re

import pytest
from transformers import Trainer

from emkd.trainer.loop import trainer
from emkd.trainer.loop.sharded import ShardedTrainer
from emkd.trainer.loop.trainer import DistillationTrainer

# Parameters of transformers 5.23, without self.
EXPECTED = {
    "get_train_dataloader": [],
    "get_batch_samples": ["epoch_iterator", "num_batches", "device"],
    "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    "create_optimizer": ["model"],
    "create_scheduler": ["num_training_steps", "optimizer"],
    "log": ["logs", "start_time"],
    "evaluate": ["eval_dataset", "ignore_keys", "metric_key_prefix"],
    "_init_training_state": [
        "max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial",
    ],
    "_run_epoch": [
        "model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial",
        "ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained",
        "steps_trained_in_current_epoch",
    ],
    "_save_checkpoint": ["model", "trial"],
    "_save": ["output_dir", "state_dict"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_load_best_model": [],
    "_move_model_to_device": ["model", "device"],
    "_defer_fsdp_gradient_reduction": [],
    "_save_optimizer_and_scheduler": ["output_dir"],
    "_load_optimizer_and_scheduler": ["checkpoint"],
}  # fmt: skip

# What the overrides call or set, besides the methods themselves.
USED = ["autocast_smart_context_manager", "get_decay_parameter_names", "get_optimizer_cls_and_kwargs"]


def parameters(method):
    return [name for name in inspect.signature(method).parameters if name != "self"]


@pytest.mark.parametrize("name", EXPECTED)
def test_trainer_has_the_method_with_the_expected_parameters(name):
    assert parameters(getattr(Trainer, name)) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_the_override_takes_what_trainer_passes(name):
    method = getattr(DistillationTrainer, name)
    assert method is not getattr(Trainer, name)
    inspect.signature(method).bind(None, *EXPECTED[name])
    named = inspect.signature(method).parameters.values()
    if not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in named):
        assert parameters(method) == EXPECTED[name], "Trainer may pass them by name"


def test_every_override_is_expected_here_and_explained_in_the_docstring():
    for kind, text in ((DistillationTrainer, trainer.__doc__), (ShardedTrainer, inspect.getdoc(ShardedTrainer))):
        overridden = {name for name, value in vars(kind).items() if callable(value) and hasattr(Trainer, name)}
        lines = text.split("Overridden methods")[1].splitlines()
        listed = {word.strip(",") for line in lines for word in line.split()[:2] if word.strip(",") in EXPECTED}
        assert overridden - {"__init__"} == listed
    assert all(name in vars(DistillationTrainer) or name in vars(ShardedTrainer) for name in EXPECTED)


def test_trainer_calls_the_private_methods():
    """An override that nothing calls any more would be silently without effect."""
    source = inspect.getsource(Trainer)
    for name in EXPECTED:
        assert re.search(rf"self\.{name}\b", source), name
    for name in USED:
        assert hasattr(Trainer, name), name
