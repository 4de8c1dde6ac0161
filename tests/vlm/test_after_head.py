"""What follows an LM head: the function and its gradient, and what a config says of it."""

import pytest
import torch
from transformers import PreTrainedConfig

from emkd.errors import ModelError
from emkd.vlm.after_head import NOTHING, AfterHead, after_head, candidates, keep

KINDS = [NOTHING, AfterHead(scale=0.125), AfterHead(cap=3.0), AfterHead(scale=2.0, cap=3.0)]


@pytest.mark.parametrize("after", KINDS, ids=str)
def test_logits_and_gradients_are_those_of_the_formula(after):
    torch.manual_seed(0)
    logits = 4 * torch.randn(5, 40)
    double = logits.double().requires_grad_()
    expected = after.scale * double
    if after.cap is not None:
        expected = after.cap * torch.tanh(expected / after.cap)
    found = after(logits)
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    given = torch.randn(5, 40)
    (reference,) = torch.autograd.grad((given * expected).sum(), double)
    torch.testing.assert_close(after.backward(given, found).double(), reference, rtol=1e-4, atol=1e-6)
    assert found.dtype == after.backward(given, found).dtype == torch.float32
    assert after(logits.bfloat16()).dtype == torch.bfloat16


def config(**values):
    return PreTrainedConfig(**values)


def test_a_config_names_what_may_follow_and_nothing_comes_first():
    assert candidates(config()) == (NOTHING,)
    assert candidates(config(final_logit_softcapping=None, logits_scaling=1.0, logit_scale=0)) == (NOTHING,)
    assert candidates(config(final_logit_softcapping=30.0)) == (NOTHING, AfterHead(cap=30.0))
    scaled = (NOTHING, AfterHead(scale=8.0), AfterHead(scale=0.125))
    assert candidates(config(logits_scaling=8)) == scaled
    assert candidates(config(logits_scaling=8, final_logit_softcapping=2.0)) == (
        *scaled, *(AfterHead(scale=each.scale, cap=2.0) for each in scaled),
    )  # fmt: skip


class Model:
    def __init__(self, config):
        self.config = config


def test_what_is_not_known_yet_is_not_guessed():
    plain, capped = Model(config()), Model(config(final_logit_softcapping=30.0))
    assert after_head(plain) == NOTHING
    with pytest.raises(ModelError, match="nobody has found out yet whether the model uses it"):
        after_head(capped)
    keep(capped, NOTHING)
    assert after_head(capped) == NOTHING
    keep(capped, AfterHead(cap=30.0))
    assert after_head(capped) == AfterHead(cap=30.0)
