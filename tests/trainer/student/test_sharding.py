"""What cannot be sharded is refused before anything is; tests/trainer/test_sharded.py shards students on several ranks."""

import pytest
import torch
from torch import nn

from emkd.errors import ModelError, UsageError
from emkd.trainer import Recipe, with_flags
from emkd.trainer.loop.first_run import _workers
from emkd.trainer.loop.sharded import check_arguments
from emkd.trainer.recipe.arguments import training_arguments
from emkd.trainer.student.sharding import _check_groups, blocks, plain_class, whole_tensors


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.layers = nn.ModuleList(
            [nn.Sequential(nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)])) for _ in range(2)]
        )
        self.norms = nn.ModuleList([nn.ReLU()])


def checked(model):
    _check_groups(model, dict(blocks(model)))


def test_blocks_are_the_outermost_that_have_parameters():
    assert [name for name, _ in blocks(Model())] == ["layers.0", "layers.1"]
    checked(Model())


@pytest.mark.parametrize("elsewhere", ["embedding", "layers"])
def test_a_layers_parameter_that_is_shared_is_refused(elsewhere):
    model = Model()
    model.layers[0][0].weight = nn.Parameter(torch.zeros(7, 4))
    if elsewhere == "embedding":
        model.embedding.weight = model.layers[0][0].weight
    else:
        model.layers[1][0].weight = model.layers[0][0].weight
    with pytest.raises(ModelError, match="shares a parameter with a module outside of it"):
        checked(model)


def test_trainable_dtypes_that_differ_are_refused():
    model = Model()
    model.layers[1][0].to(torch.bfloat16)
    with pytest.raises(UsageError, match=r"layers\.1 are of bfloat16 and float32; use student.dtype: float32"):
        checked(model)
    model.layers[1][0].requires_grad_(False)
    checked(model)


def test_running_statistics_are_refused():
    model = Model()
    model.tower = nn.BatchNorm1d(4)
    with pytest.raises(ModelError, match="tower keeps running statistics"):
        checked(model)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"optim": "adafactor"}, r"training.optim adafactor: .*; use one of adamw_torch,"),
        ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant: true would free"),
    ],
)
def test_arguments_that_do_not_work_are_refused(tmp_path, monkeypatch, training, message):
    monkeypatch.setattr("emkd.trainer.loop.sharded.check_ranks", lambda n_ranks: None)
    check_arguments(training_arguments(tmp_path, {"use_cpu": True}))
    with pytest.raises(UsageError, match=message):
        check_arguments(training_arguments(tmp_path, {"use_cpu": True, **training}))


def test_half_precision_without_checkpointing_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("emkd.trainer.loop.sharded.check_ranks", lambda n_ranks: None)
    check_arguments(training_arguments(tmp_path, {"use_cpu": True, "bf16": True, "activation_checkpointing": True}))
    assert "half-precision copy" not in capsys.readouterr().err
    check_arguments(training_arguments(tmp_path, {"use_cpu": True, "bf16": True}))
    assert "half-precision copy" in capsys.readouterr().err


def test_dropped_rows_decide_a_run_too():
    """They depend on the samples of a micro-batch on all ranks together."""
    flags = {"student.shard": True, "training.per_device_train_batch_size": 4, "training.dataloader_drop_last": True}
    found = _workers(with_flags(Recipe(), flags), 3)
    assert found == {"samples of a step": 12, "samples of a micro-batch": 12}


def test_of_a_whole_model_tensors_and_class_are_as_they_are():
    model = Model()
    state = model.state_dict(keep_vars=True)
    found = whole_tensors(state)
    assert found.keys() == state.keys()
    assert all(found[name].data_ptr() == tensor.data_ptr() for name, tensor in state.items())
    assert not any(tensor.requires_grad for tensor in found.values())
    with plain_class(model):
        assert type(model) is Model
