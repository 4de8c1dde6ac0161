"""Checks on whole families are in tests/families/test_others.py."""

import pytest
import torch

from emkd.errors import ModelError
from emkd.samples import Dataset
from emkd.samples.encode import Encoder
from emkd.vlm import load
from emkd.vlm.checks import check_causal, check_head
from emkd.vlm.forward import collate


@pytest.fixture
def vlm(teacher_path):
    return load(str(teacher_path))


@pytest.fixture
def sample(vlm, data_path):
    return Encoder(vlm.processor, vlm.image_token_id)(Dataset(str(data_path)).sample(0))


def test_a_head_that_does_more_is_noticed(vlm, sample):
    batch = collate([sample], 0)
    check_head(vlm.model, batch, vlm.n_tokens)
    plain = type(vlm.model).forward

    def capped(self, **inputs):
        out = plain(self, **inputs)
        out.logits = torch.tanh(out.logits)
        return out

    vlm.model.forward = capped.__get__(vlm.model)
    with pytest.raises(ModelError, match="changes logits after its head"):
        check_head(vlm.model, batch, vlm.n_tokens)


def test_modules_stay_in_the_mode_they_were_in(vlm, sample):
    """A tower that is frozen stays without dropout while all else trains."""
    vlm.model.train()
    vlm.model.model.vision_tower.eval()
    before = [module.training for module in vlm.model.modules()]
    torch.manual_seed(0)
    check_causal(vlm.model, sample)
    assert [module.training for module in vlm.model.modules()] == before
    assert len(set(before)) == 2
