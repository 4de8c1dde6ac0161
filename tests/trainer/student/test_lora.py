"""LoRA: what is trained, what is frozen, what it computes, and the merged weights that are saved."""

import sys

import pytest
import torch
from torch import nn

from emkd.errors import UsageError
from emkd.trainer.recipe.recipe import LoraRecipe
from emkd.trainer.student.lora import add_lora, linear_layers, merged_weights, trainable_state
from emkd.trainer.student.parameters import freeze
from emkd.vlm.forward import base_model, keep_last_hidden_state, lm_logits
from tests import tiny
from tests.trainer.student.test_parameters import tied_model

LANGUAGE = "model.language_model."


@pytest.fixture
def model():
    return tiny.new_model(1, hidden=24, lm_head_rows=64)


def batch(model, n=2):
    """Rows of 24 tokens, with as many placeholders as the model has vision tokens for an image."""
    pool = getattr(model.config, "vision_pool", 1)
    random = torch.Generator().manual_seed(11)  # separate: tests of dropout check the global generator
    ids = torch.randint(6, 26, (n, 24), generator=random)
    ids[:, 3 : 3 + 16 // pool**2] = 2
    return {"input_ids": ids, "pixel_values": torch.randn(n, 3, tiny.SIDE, tiny.SIDE, generator=random)}


def logits(model):
    with torch.no_grad():
        return model(**batch(model)).logits


def learn(model, steps=4, seed=3):
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        model(**batch(model)).logits.logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def with_lora(model, seed=0, **chosen):
    torch.manual_seed(seed)
    add_lora(model, LoraRecipe(r=4, alpha=12, **chosen))
    return model


def test_what_learns(model):
    """Below the modules only the additions are trained; elsewhere nothing changes."""
    freeze(model, ["model.vision_tower"])
    plain = {name for name, _ in model.named_parameters()}
    with_lora(model)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    additions = {name for name in learning if ".lora_" in name}
    assert learning - additions == {name for name in plain if name.startswith("model.multi_modal_projector")}
    assert len(additions) == 2 * 2 * 7  # A and B of seven linear layers in each of two
    assert all(name.startswith(LANGUAGE + "layers.") for name in additions)


def test_modules_are_chosen_and_the_head_is_not_one(model):
    every = linear_layers(model, ["model", "lm_head"])
    assert "lm_head" not in every
    assert len(every) == sum(type(m) is nn.Linear for m in model.modules()) - 1
    with_lora(model, modules=("model.multi_modal_projector",))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {
        f"model.multi_modal_projector.linear_{n}.base_layer.{own}" for n in (1, 2) for own in ("weight", "bias")
    }


def test_the_model_stays_what_it_was(model):
    """Its class, its modules and, before training, all of its outputs."""
    before, kind = logits(model), type(model)
    with_lora(model)
    assert type(model) is kind
    assert not any(module.training for module in model.modules())
    assert torch.equal(logits(model), before)
    with keep_last_hidden_state(model) as kept, torch.no_grad():
        whole = model(**batch(model)).logits
        found = lm_logits(model, kept[0].flatten(0, 1), 26)
    torch.testing.assert_close(found, whole.flatten(0, 1)[:, :26])
    assert base_model(model) is model.model


def test_what_is_computed(model):
    """y = W x + (alpha / r) B A x, by hand."""
    layer = model.model.language_model.layers[0].self_attn.q_proj
    with_lora(model)
    learn(model)
    added = model.model.language_model.layers[0].self_attn.q_proj
    x = torch.randn(5, 24)
    low, up = added.lora_A["default"].weight, added.lora_B["default"].weight
    torch.testing.assert_close(added(x), layer(x) + 12 / 4 * x @ low.T @ up.T)
    assert low.shape == (4, 24)
    assert up.abs().sum() > 0


def test_frozen_weights_do_not_move(model):
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with_lora(model)
    start = {name: tensor.clone() for name, tensor in trainable_state(model).items()}
    learn(model)
    for name, tensor in model.state_dict().items():
        if (LANGUAGE in name or "lm_head" in name) and ".lora_" not in name:
            assert torch.equal(tensor, plain[name.replace(".base_layer", "")]), name
    moved = {name for name, tensor in trainable_state(model).items() if not torch.equal(tensor, start[name])}
    assert {name for name in start if ".lora_" in name} <= moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_those_of_a_plain_model(dtype):
    """Their names, their dtypes and what they compute; the live model is not touched, bit for bit."""
    model, plain = (tiny.new_model(1, hidden=24, lm_head_rows=64).to(dtype) for _ in range(2))
    with_lora(model)
    learn(model.float() if dtype == torch.float32 else model_under_autocast(model))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = merged_weights(model, model.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name: (t.shape, t.dtype) for name, t in merged.items()} == {
        name: (t.shape, t.dtype) for name, t in plain.state_dict().items()
    }
    untouched = logits(plain)
    plain.load_state_dict(merged)
    assert not torch.allclose(logits(plain), untouched, atol=1e-2)
    tolerance = 1e-5 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(logits(plain), logits(model), atol=tolerance, rtol=tolerance)


def model_under_autocast(model):
    forward = model.forward
    model.forward = lambda **given: torch.autocast("cpu", torch.bfloat16)(forward)(**given)
    return model


def test_additions_are_float32_over_bfloat16_weights(model):
    with_lora(model.bfloat16())
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert {kind for name, kind in kinds.items() if ".lora_" in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if ".lora_" not in name} == {torch.bfloat16}
    assert model.dtype == torch.bfloat16
    assert all(p.requires_grad for name, p in model.named_parameters() if ".lora_" in name)


def test_a_tied_head_is_frozen_with_the_embeddings():
    model, plain = tied_model(), tied_model()
    with_lora(model)
    learn(model)
    merged = merged_weights(model, model.state_dict())
    assert torch.equal(merged["lm_head.weight"], plain.state_dict()["lm_head.weight"])
    plain.load_state_dict(merged)
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-5, rtol=1e-5)


def test_the_seed_decides_the_beginning():
    one, same, other = (
        trainable_state(with_lora(tiny.new_model(1, hidden=24, lm_head_rows=64), seed)) for seed in (0, 0, 1)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_dropout_is_a_function_of_torchs_random_state(model):
    with_lora(model, dropout=0.5)
    learn(model)  # an addition of 0 stays 0, dropped or not
    model.train()
    found = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        found.append(logits(model))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_gradient_checkpointing_changes_no_gradient(model):
    """Vision tower and embeddings are frozen: nothing that enters the first layers needs a gradient."""
    freeze(model, ["model.vision_tower"])
    with_lora(model, modules=("model.language_model", "model.multi_modal_projector", "lm_head"))
    learn(model, steps=1)  # where B is 0, the gradient of A is
    model.train()
    found = []
    for enable in (False, True):
        if enable:
            model.activation_checkpointing_enable()
        model(**batch(model)).logits.logsumexp(-1).mean().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert set(found[0]) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(found[1]) == set(found[0])
    for name, grad in found[0].items():
        assert grad.any(), name
        torch.testing.assert_close(found[1][name], grad)


def test_modules_that_cannot_have_any(model):
    with pytest.raises(
        UsageError,
        match=r"student.lora.modules 'model.visual': no parameter's name starts with it; .*model.vision_tower",
    ):
        with_lora(model, modules=("model.language_model", "model.visual"))
    with pytest.raises(
        UsageError,
        match=r"student.lora.modules lm_head: they have no linear layer except the LM head; name modules that have linear layers, among .*model.language_model",
    ):
        with_lora(model, modules=("lm_head",))
    assert not any(".lora_" in name for name, _ in model.named_parameters())


def test_without_peft_the_way_to_it_is_said(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        UsageError, match=r"student.lora needs peft.*pip install 'emkd\[lora\]', or remove student.lora"
    ):
        with_lora(model)
