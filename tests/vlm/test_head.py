"""The LM head gives the module's logits, and refuses modules that it cannot represent."""

import pytest
import torch
from transformers import PreTrainedConfig

from emkd.errors import ModelError
from emkd.vlm import head as head_module
from emkd.vlm.after_head import AfterHead, keep
from emkd.vlm.head import LMHead


class Model:
    config = PreTrainedConfig()

    def __init__(self, head: torch.nn.Module) -> None:
        self.head = head

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head


@pytest.fixture
def linear() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(12, 40)


@pytest.mark.parametrize("gathered", [1, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_and_blocks_are_the_modules_logits(linear, gathered, dtype, monkeypatch):
    monkeypatch.setattr(head_module, "GATHERED", {"cpu": gathered})
    linear, hidden = linear.to(dtype), torch.randn(5, 12).to(dtype)
    head = LMHead.of(Model(linear), 37)
    expected = (hidden.double() @ linear.weight.double().T + linear.bias.double())[:, :37]
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    ids = torch.tensor([36, 0, 7, 7])
    torch.testing.assert_close(head.columns(hidden, ids).double(), expected[:, ids].T, rtol=bound, atol=bound)
    blocks = list(head.blocks(hidden, 10))
    assert [block.shape for block in blocks] == [(5, 10), (5, 10), (5, 10), (5, 7)]
    torch.testing.assert_close(torch.cat(blocks, 1).double(), expected, rtol=bound, atol=bound)
    assert {tensor.dtype for tensor in (*blocks, head.columns(hidden, ids))} == {torch.float32}


@pytest.mark.parametrize("after", [AfterHead(scale=0.5), AfterHead(cap=0.7), AfterHead(scale=3.0, cap=0.7)])
def test_what_follows_the_head_is_in_all_logits(linear, after, monkeypatch):
    monkeypatch.setattr(head_module, "GATHERED", {"cpu": 24})
    model, hidden = Model(linear), torch.randn(5, 12)
    keep(model, after)
    head = LMHead.of(model, 37)
    expected = after.scale * (hidden.double() @ linear.weight.double().T + linear.bias.double())[:, :37]
    if after.cap is not None:
        expected = after.cap * torch.tanh(expected / after.cap)
    ids = torch.tensor([36, 0, 7, 7])
    torch.testing.assert_close(head.columns(hidden, ids).double(), expected[:, ids].T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat(list(head.blocks(hidden, 10)), 1).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head.logsumexp(hidden, 10).double(), expected.logsumexp(1), rtol=1e-5, atol=1e-6)


def test_the_product_is_in_the_dtype_of_autocast(linear):
    hidden, head = torch.randn(5, 12), LMHead.of(Model(linear), 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert head.dtype == torch.bfloat16
        (found,) = head.blocks(hidden, 40)
        expected = linear(hidden)
    assert expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected.float())
    assert head.dtype == torch.float32


def test_a_head_that_is_no_linear_layer_is_refused(linear):
    with pytest.raises(ModelError, match="the LM head of Model is a Sequential, not a linear layer"):
        LMHead.of(Model(torch.nn.Sequential(linear)), 40)
