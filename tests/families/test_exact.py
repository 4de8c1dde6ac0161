"""Ten families as teachers and students: from a saved checkpoint to a cache, and from there to a student's losses,
which equal the losses with the teacher in memory."""

from typing import Any

import pytest
import torch

from emkd.agreement.template import adopt_template
from emkd.errors import ModelError
from emkd.samples.dataset import Dataset
from emkd.samples.encode import Encoder
from emkd.vlm import load
from emkd.vlm.pooling import pooled
from tests.families.naive import ROWS, cached_losses, check_losses, naive_view
from tests.trainer import dense

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("window", [1, 2])
def test_cached_losses_are_those_of_the_teacher_in_memory(family, window, teacher, student, cache, data):
    """With the vision tokens that the student has, and with a quarter of them."""
    assert (len(cache), cache.skipped.num_rows) == (len(ROWS), 0), cache.skipped.to_pylist()
    loaded = load(str(student))
    loaded.model = pooled(loaded.model, loaded.processor, window)
    ours, theirs = check_losses(loaded, cache, data, load(str(teacher)), family)
    for few, many in zip(ours, theirs, strict=True):
        for own, whole in zip(few.vision, many.vision, strict=True):
            assert (len(own) <= len(whole) / 2) if window == 2 else (len(own) == len(whole))


def test_students_of_every_family(family, teacher, students, cache, data):
    """With other hidden sizes, other tiles, a quarter of their vision tokens, and their own tokens around images, which
    are left out of the comparison on both sides if the other model does not write them."""
    memory = load(str(teacher))
    for name, path in students.items():
        loaded = load(str(path))
        adopt_template(loaded.processor, cache.manifest.tokenizer.chat_template)
        loaded.model = pooled(loaded.model, loaded.processor, 2)
        found = cached_losses(loaded, cache, data)
        with torch.no_grad():
            texts = [
                naive_view(one.model, one.processor, of, ROWS[0])[1] for one, of in ((memory, family), (loaded, name))
            ]
            words = texts[0] != texts[1]
            theirs = [naive_view(memory.model, memory.processor, family, row, words) for row in ROWS]
            ours = [naive_view(loaded.model, loaded.processor, name, row, words) for row in ROWS]
        assert [text for _, text in ours] == [text for _, text in theirs]
        expected = dense.losses([view for view, _ in ours], [view for view, _ in theirs])
        for part in ("sup", "rld", "vsd", "vlad"):
            assert float(getattr(found, part).detach()) == pytest.approx(float(expected[part]), rel=1e-5), (name, part)


class Silent:
    """A processor that does not say which text it replaced."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, **given: Any) -> dict[str, Any]:
        return {n: v for n, v in self._processor(**given).items() if n != "text_replacement_offsets"}


@pytest.mark.parametrize("family", ["llava"], indirect=True)
def test_a_processor_that_lacks_what_is_needed_is_refused(student, data):
    loaded = load(str(student))
    encoder = Encoder(Silent(loaded.processor), loaded.image_token_id)
    assert encoder(Dataset(str(data)).sample(5)).n_vision == 0
    with pytest.raises(ModelError, match="Silent does not report by which text it replaced an image's placeholder"):
        encoder(Dataset(str(data)).sample(0))
