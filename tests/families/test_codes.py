"""Codes of ten families: the error of the logits that are read from them is the one that was predicted."""

import pytest

from emkd.storage.cache import Cache
from emkd.trainer.losses.divergence import Divergence
from emkd.trainer.losses.weights import Weights
from emkd.trainer.objective.objective import Objective
from emkd.vlm import load
from emkd.vlm.codes import Codes
from tests import tiny
from tests.trainer.test_exactness import student_and_batch

pytestmark = pytest.mark.slow

ERROR = 0.25


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_measured_error_is_the_predicted_one(family, teacher, data, tmp_path, dtype):
    """In bfloat16 the logits themselves are rounded: 2**-9 of their size, on top of what codes lose."""
    cache = Cache.open(
        tiny.make_cache(teacher, data, tmp_path / "cache", top_k=4, answer_top_k=5, logit_error=ERROR, dtype=dtype)
    )
    measured = cache.totals.logit_error
    print(f"{family}, {dtype}: predicted {ERROR}, measured {measured:.4f}")
    assert cache.manifest.basis.logit_error == ERROR
    assert 0.2 * ERROR < measured <= 1.1 * ERROR if dtype == "float32" else measured <= 1.5 * ERROR


def test_a_student_trains_from_them(family, teacher, student, data, tmp_path):
    """Affinities from codes, too: finite losses with gradients, of the family's own student."""
    path = tiny.make_cache(
        teacher, data, tmp_path / "cache", top_k=4, answer_top_k=5, logit_error=ERROR, affinity="codes"
    )
    cache = Cache.open(path)
    loaded, batch = student_and_batch(student, data, path, 1)
    n_tokens = min(loaded.n_tokens, cache.manifest.vocabulary_size)
    objective = Objective(Weights(), n_tokens, Divergence(tail="codes"), codes=Codes(cache.basis, "cpu"))
    samples = batch["samples"]
    found = objective(loaded.model, loaded.model, batch["inputs"], samples, objective.count(samples))
    assert all(float(value.detach()) > 0 for value in (found.sup, found.rld, found.vsd, found.vlad))
    found.total.backward()
    gradients = [p.grad for p in loaded.model.parameters() if p.grad is not None]
    assert gradients
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert load(str(teacher)).n_tokens == cache.manifest.vocabulary_size
