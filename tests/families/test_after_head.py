"""Models that change logits after their LM head, as teacher and as student: classes of transformers, through the job.

Mistral Large 4 has a softcap, Granite 4 Vision a divisor. LLaVA-NeXT around a Granite and Gemma 3 have configs that
name such numbers, which their classes ignore.
"""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import transformers as hf

from emkd.errors import ModelError
from emkd.samples.dataset import Dataset
from emkd.samples.encode import Encoder
from emkd.storage.cache import Cache
from emkd.trainer.losses.divergence import Divergence
from emkd.trainer.losses.weights import Weights
from emkd.trainer.objective.objective import Objective
from emkd.vlm import load
from emkd.vlm.after_head import NOTHING, AfterHead, after_head
from emkd.vlm.checks import check_head, check_teacher
from emkd.vlm.codes import Codes
from emkd.vlm.forward import collate, last_hidden_state, lm_logits, to_model
from emkd.vlm.head import LMHead
from tests import tiny
from tests.families import gemma3, llava_next, text_settings
from tests.families.naive import ROWS, STUDENT, TEACHER, V, naive_view
from tests.families.others import WORK, granite4_vision, mistral_large4, save
from tests.trainer import dense
from tests.trainer.test_exactness import NAMES, compare_gradients, gradients, relative, student_and_batch

CHANGING = {"mistral_large4": AfterHead(cap=2.0), "granite4_vision": AfterHead(scale=1 / 3)}
ERROR = 0.25


def granite_that_is_ignored(hidden):
    config, processor = llava_next(hidden)
    config.text_config = hf.GraniteConfig(**text_settings(hidden), logits_scaling=4.0)
    return config, processor


def gemma_that_ignores(hidden, cap):
    config, processor = gemma3(hidden)
    config.text_config.final_logit_softcapping = cap
    return config, processor


def first(vlm, data):
    return Encoder(vlm.processor, vlm.image_token_id)(Dataset(str(data)).sample(0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (mistral_large4, AfterHead(cap=2.0)),
        # Logits are at most 10 here, on which a softcap of 10,000 changes nothing that float32 can hold.
        (partial(mistral_large4, cap=1e4), AfterHead(cap=1e4)),
        (partial(gemma_that_ignores, cap=1e4), NOTHING),
        (partial(gemma_that_ignores, cap=0.5), NOTHING),
        (granite4_vision, AfterHead(scale=1 / 3)),
        (granite_that_is_ignored, NOTHING),
    ],
    ids=["cap", "large cap", "ignored large cap", "ignored cap", "divisor", "ignored divisor"],
)
def test_the_model_decides_and_not_its_config(build, expected, dtype, data, tmp_path):
    vlm = load(str(save(build, tmp_path / "model", **TEACHER)), dtype=dtype)
    sample = first(vlm, data)
    with pytest.raises(ModelError, match="nobody has found out"):
        LMHead.of(vlm.model, vlm.n_tokens)
    check_teacher(vlm, sample, 0)
    assert after_head(vlm.model) == LMHead.of(vlm.model, vlm.n_tokens).after == expected
    assert after_head(copy.deepcopy(vlm.model)) == expected
    batch = to_model(collate([sample], 0), vlm.model)
    own = vlm.model(**batch).logits[0, :, : vlm.n_tokens]
    found = lm_logits(vlm.model, last_hidden_state(vlm.model, batch)[0], vlm.n_tokens)
    bound = 1e-6 if dtype == "float32" else 2e-2
    torch.testing.assert_close(found, own.float(), rtol=bound, atol=bound)


@pytest.mark.parametrize("used", [2.5, 1e4])
def test_another_softcap_than_the_configs_is_refused(used, data, tmp_path):
    """Also where it is so large that the sample's own logits would not show it."""
    vlm = load(str(save(partial(mistral_large4, cap=30 * used), tmp_path / "model", **TEACHER)))
    vlm.model.final_logit_softcapping = used
    with pytest.raises(
        ModelError, match=r"changes logits after its head .*tried, from its config: nothing, a softcap of"
    ):
        check_head(vlm.model, collate([first(vlm, data)], 0), vlm.n_tokens)


@pytest.fixture(scope="module", params=CHANGING)
def changing(request, data, tmp_path_factory):
    """(family, teacher, student), checkpoints of a family that changes logits."""
    folder = tmp_path_factory.mktemp(request.param)
    build = WORK[request.param]
    return request.param, save(build, folder / "teacher", **TEACHER), save(build, folder / "student", **STUDENT)


def own_logits(teacher):
    """{answer: [A, V], vision: [N, V]} of each row, from the model's own forward pass without emkd."""
    vlm = load(str(teacher))
    with torch.no_grad():
        views = [naive_view(vlm.model, vlm.processor, "", row)[0] for row in ROWS]
    return [{"answer": v.answer_logits, "vision": torch.cat([v.answer_logits[:0], *v.vision_logits])} for v in views]


@pytest.mark.slow
def test_the_cache_has_the_models_own_logits(changing, data, tmp_path):
    """The largest, the tails, and, within the predicted error, all that codes say."""
    family, teacher, _ = changing
    after = CHANGING[family]
    cache = Cache.open(tiny.make_cache(teacher, data, tmp_path / "c", top_k=4, answer_top_k=5, logit_error=ERROR))
    basis = cache.basis
    assert cache.manifest.basis.cap == basis.cap == after.cap
    squares = []
    for number, own in enumerate(own_logits(teacher)):
        for tokens, logits in own.items():
            found = getattr(cache.record(number), tokens)
            k = found.ids.shape[1]
            largest = logits.topk(k, dim=1).values
            np.testing.assert_allclose(logits.gather(1, torch.from_numpy(found.ids).long()), largest, atol=1e-5)
            np.testing.assert_allclose(found.logits, largest, rtol=1e-5, atol=1e-5)
            rest = logits.scatter(1, torch.from_numpy(found.ids).long(), -torch.inf)
            np.testing.assert_allclose(found.tail_logsumexp, rest.logsumexp(1), rtol=1e-5, atol=1e-5)
            read = basis.step * found.codes @ basis.head.astype(np.float64).T + basis.offset
            read = read if basis.cap is None else basis.cap * np.tanh(read / basis.cap)
            squares.append(((read - logits.numpy()) ** 2).mean(axis=1))
    measured = float(np.concatenate(squares).mean() ** 0.5)
    assert 0.05 * ERROR < measured <= 1.1 * ERROR
    if after.cap is None:
        assert measured > 0.5 * ERROR  # the prediction is of scaled logits
    assert cache.totals.logit_error == pytest.approx(measured, rel=0.5)


def losses(student_path, data, cache_path, **options):
    cache = Cache.open(cache_path)
    student, batch = student_and_batch(student_path, data, cache_path, 1)
    codes = None if cache.basis is None else Codes(cache.basis, "cpu")
    tail = "uniform" if codes is None else "codes"
    objective = Objective(Weights(), V, Divergence(tail=tail), codes=codes, **options)
    counts = objective.count(batch["samples"])
    return student, objective(student.model, student.model, batch["inputs"], batch["samples"], counts)


def in_memory(student, teacher_path):
    """{name: loss} with both models in memory, from their own logits, with gradients to the student."""
    teacher = load(str(teacher_path))
    with torch.no_grad():
        theirs = [naive_view(teacher.model, teacher.processor, "", row)[0] for row in ROWS]
    return dense.losses([naive_view(student.model, student.processor, "", row)[0] for row in ROWS], theirs)


@pytest.mark.slow
def test_losses_and_gradients_equal_those_in_memory(changing, data, tmp_path):
    """With k = V, teacher and student of the family: sums in float64 of the models' own logits."""
    _, teacher, path = changing
    student, found = losses(path, data, tiny.make_cache(teacher, data, tmp_path / "c"))
    expected = in_memory(student, teacher)
    for name in NAMES:
        assert float(expected[name].detach()) > 1e-3
        assert relative(getattr(found, name), expected[name]) <= 1e-5, name
    total = sum(weight * expected[name] for name, weight in zip(NAMES, (0.5, 0.5, 0.25, 25.0), strict=True))
    compare_gradients(gradients(student, found.total), gradients(student, total))


@pytest.mark.slow
def test_from_codes_the_losses_converge(changing, data, tmp_path):
    """To those in memory, as the error of logits goes to 0."""
    _, teacher, path = changing
    off = []
    for error in (0.3, 0.03, 0.003):
        cache = tiny.make_cache(teacher, data, tmp_path / f"c{error}", top_k=4, answer_top_k=5, logit_error=error)
        student, found = losses(path, data, cache)
        expected = in_memory(student, teacher)
        off.append(max(relative(getattr(found, name), expected[name]) for name in ("rld", "vsd")))
    assert off[2] < 2e-3
    assert off[2] < 0.2 * off[0]
