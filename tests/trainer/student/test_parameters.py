"""Which parameters are trained: each trainable one is in exactly one group, with its learning rate and decay."""

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from emkd.errors import UsageError
from emkd.trainer.student.parameters import fill, freeze, n_parameters, parameter_groups, persistent_buffers
from tests import tiny


@pytest.fixture
def model():
    return tiny.new_model(1, hidden=24, lm_head_rows=64)


@pytest.fixture
def tied():
    return tied_model()


def tied_model():
    """A LLaVA whose LM head is its embeddings."""
    config = tiny.new_model(1, hidden=24, lm_head_rows=64).config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    torch.manual_seed(1)
    return LlavaForConditionalGeneration(config).eval()


def decaying(model):
    return {name for name, parameter in model.named_parameters() if parameter.dim() > 1}


def placed(model, groups):
    """(learning rate or None, decay) of each parameter by name; fails for one that is in two groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found, f"{name} is in two groups"
            found[name] = (group.get("lr"), group["weight_decay"])
    return found


def test_freezing_is_by_the_beginning_of_names(model):
    freeze(model, ["model.vision", "lm_head"])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith(("model.vision_tower.", "lm_head."))}
    assert frozen


def test_freezing_what_is_not_there(model):
    with pytest.raises(
        UsageError,
        match=r"freeze 'no.such': no parameter's name starts with it; Expected one of vision_tower, projector, "
        r"language_model, lm_head, which are parts of every family. Prefixes of names work as well: lm_head.weight, "
        r"model.language_model, model.multi_modal_projector, model.vision_tower, or longer ones",
    ):
        freeze(model, ["no.such"])


def test_either_name_freezes_a_tied_parameter(tied):
    freeze(tied, ["lm_head"])
    assert not tied.get_input_embeddings().weight.requires_grad


def test_groups_cover_what_learns_exactly_once(model):
    freeze(model, ["model.vision_tower.encoder"])
    rates = {"model.vision_tower": 1e-4, "model.language_model": 2e-4, "model.language_model.layers.1": 3e-4}
    decay = decaying(model)
    groups = parameter_groups(model, rates, decay, 0.1)
    found = placed(model, groups)
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, (rate, weight_decay) in found.items():
        expected = None
        for prefix in ("model.vision_tower", "model.language_model", "model.language_model.layers.1"):
            expected = rates[prefix] if name.startswith(prefix) else expected
        assert rate == expected, name
        assert weight_decay == (0.1 if name in decay else 0.0), name
    assert {rate for rate, _ in found.values()} == {None, *rates.values()}
    assert len(groups) == 8, "four rates, with decay and without"
    assert ["lr" in group for group in groups] == [False] * 2 + [True] * 6


def test_the_longest_prefix_decides_whatever_the_order(model):
    rates = {"model.language_model.layers": 1e-4, "model": 2e-4}
    for given in (rates, dict(reversed(rates.items()))):
        found = placed(model, parameter_groups(model, given, decaying(model), 0.1))
        for name, (rate, _) in found.items():
            expected = 1e-4 if name.startswith("model.language_model.layers") else 2e-4
            assert rate == (None if name == "lm_head.weight" else expected), name


def test_an_optimizer_takes_them(model):
    groups = parameter_groups(model, {"lm_head": 5e-4}, decaying(model), 0.1)
    optimizer = torch.optim.AdamW(groups, lr=7e-4)
    assert [group["lr"] for group in optimizer.param_groups] == [7e-4, 7e-4, 5e-4]


def test_a_tied_parameter_is_in_one_group_under_its_longest_prefix(tied):
    rates = {"lm_head": 1e-4, "model.language_model.embed_tokens": 2e-4, "model.language_model": 3e-4}
    found = placed(tied, parameter_groups(tied, rates, decaying(tied), 0.1))
    assert set(found) == {name for name, _ in tied.named_parameters()}
    assert found["model.language_model.embed_tokens.weight"] == (2e-4, 0.1)
    one = placed(tied, parameter_groups(tied, {"lm_head": 1e-4}, decaying(tied), 0.1))
    assert one["model.language_model.embed_tokens.weight"] == (1e-4, 0.1)


def test_a_rate_that_names_nothing_or_only_what_is_frozen(model):
    with pytest.raises(
        UsageError,
        match=r"student.learning_rates 'model.visual': no parameter's name starts with it; did you mean 'model.vision_tower'\? Expected one of .*model.vision_tower",
    ):
        parameter_groups(model, {"model.visual": 1e-4}, (), 0.0)
    freeze(model, ["model.vision_tower"])
    with pytest.raises(
        UsageError,
        match=r"student.learning_rates 'model.vision_tower': all [\d,]+ parameters .* are frozen .*remove this learning rate, or do not freeze them",
    ):
        parameter_groups(model, {"model.vision_tower": 1e-4}, (), 0.0)


def test_counts(tied):
    by_hand = sum(p.numel() for p in tied.parameters())
    assert n_parameters(tied) == n_parameters(tied, trainable=True) == by_hand
    freeze(tied, ["lm_head"])
    assert n_parameters(tied, trainable=True) == by_hand - 64 * 24


def test_buffers_that_are_saved():
    assert sorted(persistent_buffers(torch.nn.BatchNorm1d(3))) == ["num_batches_tracked", "running_mean", "running_var"]
    assert persistent_buffers(torch.nn.Linear(2, 2)) == {}


def test_filling_copies_all_or_says_what_differs():
    here = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}
    wrong = {"a": torch.ones(2), "b": torch.ones(4), "c": torch.ones(1, dtype=torch.bfloat16), "d": torch.ones(1)}
    assert fill(here, wrong) == [
        "d is unexpected",
        "b is float32 [4], expected float32 [3]",
        "c is bfloat16 [1], expected float32 [1]",
    ]
    assert fill(here, {}) == ["a is missing", "b is missing", "c is missing"]
    assert not any(tensor.any() for tensor in here.values())
    assert fill(here, {name: torch.ones_like(tensor) for name, tensor in here.items()}) == []
    assert all(tensor.all() for tensor in here.values())
