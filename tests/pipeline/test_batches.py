"""What is cached of a sample does not depend on its batch: on padding, on its side, on the other samples.

Tolerance: the relative error |x - y| / |y| (Frobenius) of two ways to compute the same logits is at most 8 eps of the
dtype. Each of the roundings that a number goes through, some 60 in these models of two and two layers, is at most eps /
2 and of either sign: sqrt(60) / 2 = 4 eps, and twice that for what later layers make of it. Padding on the left moves a
sample to other positions; RoPE uses only their differences, but its angles, of up to 99 radians here, are rounded in
float32 for every dtype: 99 / 2 eps of float32 on top.

Measured: 4.7 eps in float32 and 0.9 eps in bfloat16 against single samples, 12 and 3.1 eps against padding on the
left. A wrong mask makes an error of 0.16 to 0.76, where the tolerance is 1e-6 (left: 7e-6) and 0.06.
"""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from emkd.errors import ModelError
from emkd.pipeline.capture import CaptureSettings, Teacher
from emkd.samples import Dataset
from emkd.vlm import load
from emkd.vlm.forward import collate, last_hidden_state, lm_logits, to_model
from tests import tiny
from tests.storage.builders import array_fields
from tests.trainer import dense

V = len(tiny.VOCABULARY)
ROUNDINGS = 8
LONGEST = 99
WRONG = 0.125  # twice the tolerance of bfloat16


def mixed_rows():
    """Text only, 1 to 3 images, 5 to 99 tokens."""
    said = tiny.turn
    return [
        *tiny.rows(),
        {"id": "three", "images": [tiny.png(n) for n in (8, 9, 10)], "messages": [said("user", "<image> and <image> and <image> what is that"), said("assistant", "red")]},
        {"id": "long", "images": [], "messages": [said("user", "is that one red and big " * 14), said("assistant", "yes " * 12)]},
        {"id": "short", "images": [], "messages": [said("user", "cat"), said("assistant", "no")]},
    ]  # fmt: skip


ROWS = mixed_rows()
EVERY = range(len(ROWS))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return Dataset(str(tiny.write_data(tmp_path_factory.mktemp("mixed") / "rows.parquet", ROWS)))


def with_padding_side(teacher_path, folder, side):
    """The teacher with that padding side in its checkpoint."""
    path = shutil.copytree(teacher_path, folder / side)
    config = path / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"padding_side": side}))
    return path


attention = pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def teacher(path, batch_tokens=10_000, **options) -> Teacher:
    settings = CaptureSettings(
        top_k=V, answer_top_k=V, logits_precision="float32", batch_tokens=batch_tokens, max_length=None
    )
    return Teacher(load(str(path), **options), settings)


def by_id(ids: np.ndarray, logits: np.ndarray) -> torch.Tensor:
    """[n, V] logits by id, from all of them in their stored order."""
    found = torch.zeros(ids.shape)
    return found.scatter(1, torch.from_numpy(ids).long(), torch.from_numpy(logits)).double()


def error_of(found, expected) -> float:
    """The largest relative error of vision logits, answer logits and affinities of two (vision, answer, affinity)."""
    pairs = [(x, y) for x, y in zip(found, expected, strict=True) if y.numel()]
    assert all(x.shape == y.shape for x, y in pairs)
    return max(float((x - y).norm() / y.norm()) for x, y in pairs)


def numbers(record):
    return (
        by_id(record.vision.ids, record.vision.logits),
        by_id(record.answer.ids, record.answer.logits),
        torch.from_numpy(record.affinity).double(),
    )


def tolerance(dtype: str) -> float:
    return ROUNDINGS * torch.finfo(getattr(torch, dtype)).eps


@attention
@dtypes
@pytest.mark.parametrize("batch_tokens", [200, 10_000])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_gives_what_its_samples_give_alone(
    teacher_path, dataset, tmp_path, dtype, attn_implementation, batch_tokens, side
):
    path = with_padding_side(teacher_path, tmp_path, side)
    options = {"dtype": dtype, "attn_implementation": attn_implementation}
    together, alone = (teacher(path, tokens, **options) for tokens in (batch_tokens, 1))
    assert together.vlm.processor.tokenizer.padding_side == side
    for found, expected in zip(together.capture(dataset, EVERY), alone.capture(dataset, EVERY), strict=True):
        assert found.record.text_ids.tolist() == expected.record.text_ids.tolist()
        assert found.record.answer_positions.tolist() == expected.record.answer_positions.tolist()
        assert error_of(numbers(found.record), numbers(expected.record)) <= tolerance(dtype)


@attention
@dtypes
def test_padding_side_does_not_change_a_bit(teacher_path, dataset, tmp_path, dtype, attn_implementation):
    """Batches are padded on the right, independent of the tokenizer's setting, so the cache does not depend on the
    side."""
    found = []
    for side in ("left", "right"):
        path = with_padding_side(teacher_path, tmp_path, side)
        found.append(teacher(path, dtype=dtype, attn_implementation=attn_implementation).capture(dataset, EVERY))
    for one, other in zip(*found, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(numbers(one.record), numbers(other.record), strict=True))


def left_padded(found: Teacher) -> dict[str, torch.Tensor]:
    """All rows as the processor itself makes a batch of them; the text is written down from the rows."""
    tokenizer = found.vlm.processor.tokenizer
    texts = [" ".join(tokenizer.convert_ids_to_tokens(dense.prompt_of(row, tokenizer).ids)) for row in ROWS]
    images = [Image.open(io.BytesIO(data)).convert("RGB") for row in ROWS for data in row["images"]]
    made = found.vlm.processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
    return to_model(dict(made), found.vlm.model)


@torch.no_grad()
def naive_numbers(found: Teacher, batch):
    """(vision, answer, affinity) of each row of a batch padded on the left, by the model called whole."""
    out = found.vlm.model(**batch, output_hidden_states=True)
    logits, hidden = out.logits[..., :V].double(), out.hidden_states[-1].double()
    for row, ids, own, states in zip(ROWS, batch["input_ids"], logits, hidden, strict=True):
        prompt = dense.prompt_of(row, found.vlm.processor.tokenizer)
        answer = [a for token, a in zip(prompt.ids, prompt.answer, strict=True) for _ in range(16 if token == 2 else 1)]
        begin = len(ids) - len(answer)
        at = begin + torch.tensor(answer).nonzero()[:, 0]
        vision = ids == dense.IMAGE
        text = ~vision & (torch.arange(len(ids)) >= begin)
        cosine = torch.nn.functional.cosine_similarity(states[text][:, None], states[vision][None], dim=2)
        yield own[vision], own[at - 1], cosine


@attention
@dtypes
def test_records_are_those_of_a_batch_padded_on_the_left(teacher_path, dataset, dtype, attn_implementation):
    """And without its mask that batch gives something else for each padded row: the test can fail."""
    found = teacher(teacher_path, dtype=dtype, attn_implementation=attn_implementation)
    records = [numbers(result.record) for result in found.capture(dataset, EVERY)]
    batch = left_padded(found)
    padding = (batch["attention_mask"] == 0).sum(dim=1)
    assert (padding > 0).sum() == len(ROWS) - 1
    assert batch["attention_mask"].shape[1] == LONGEST
    assert batch["attention_mask"][:, -1].all()
    errors = [error_of(x, y) for x, y in zip(records, naive_numbers(found, batch), strict=True)]
    assert max(errors) <= tolerance(dtype) + LONGEST / 2 * torch.finfo(torch.float32).eps
    batch.pop("attention_mask")
    errors = [error_of(x, y) for x, y in zip(records, naive_numbers(found, batch), strict=True)]
    assert all(error > WRONG for error, padded in zip(errors, padding, strict=True) if padded)


@attention
@dtypes
@torch.no_grad()
def test_a_mask_that_hides_a_token_shows_and_one_for_padding_on_the_right_does_not(
    teacher_path, dataset, dtype, attn_implementation
):
    """No token of a causal model looks to its right, so that padding there is unseen with or without a mask.

    What a mask could spoil is a token of the sample itself: hiding the first one changes every row.
    """
    found = teacher(teacher_path, dtype=dtype, attn_implementation=attn_implementation)
    items = [found.encoder(dataset.sample(row)) for row in EVERY]

    def answers(mask):
        batch = collate(items, found.pad_token_id)
        batch = {name: tensor for name, tensor in batch.items() if name != "attention_mask"}
        batch = to_model(batch | ({} if mask is None else {"attention_mask": mask}), found.vlm.model)
        states = last_hidden_state(found.vlm.model, batch)
        return [
            lm_logits(found.vlm.model, x[item.predicting_positions], V) for x, item in zip(states, items, strict=True)
        ]

    mask = collate(items, found.pad_token_id)["attention_mask"]
    assert mask.sum(dim=1).tolist() == [item.n_tokens for item in items]
    hidden = mask.clone()
    hidden[:, 0] = 0
    right = answers(mask)
    assert max(error_of([x], [y]) for x, y in zip(answers(None), right, strict=True)) <= tolerance(dtype)
    assert min(error_of([x], [y]) for x, y in zip(answers(hidden), right, strict=True)) > WRONG


FOUR = [ROWS[n] for n in (1, 2, 3, 5)]
BAD = "none"  # of "none of them", and of no other row of FOUR


def with_bad_word(position: int):
    """FOUR, BAD instead of a word in the given row; the lengths stay as they are."""
    rows = [{**row, "messages": [dict(message) for message in row["messages"]]} for row in FOUR]
    rows[3]["messages"][1]["content"] = "one of them"
    first = rows[position]["messages"][0]
    first["content"] = first["content"].replace("what", BAD).replace("is", BAD)
    return rows


@attention
@dtypes
@pytest.mark.parametrize("position", range(4))
def test_a_row_that_is_not_finite_costs_no_other(tmp_path, teacher_path, position, dtype, attn_implementation):
    data = Dataset(str(tiny.write_data(tmp_path / "rows.parquet", with_bad_word(position))))
    found = teacher(teacher_path, dtype=dtype, attn_implementation=attn_implementation)
    clean = found.capture(data, range(4))
    with torch.no_grad():
        found.vlm.model.get_input_embeddings().weight[tiny.VOCABULARY.index(BAD)] = torch.nan
    check_only(position, found.capture(data, range(4)), clean)


def check_only(position, dirty, clean) -> None:
    """That row is skipped, all others are bit-equal."""
    assert {result.reason for result in clean} == {""}
    assert [result.reason for result in dirty] == ["not-finite" if n == position else "" for n in range(len(clean))]
    for number, (one, other) in enumerate(zip(dirty, clean, strict=True)):
        if number != position:
            assert (one.record.key, one.record.images) == (other.record.key, other.record.images)
            found = array_fields(one.record)
            for name, value in array_fields(other.record).items():
                assert np.array_equal(found[name], value), name


@attention
@dtypes
@pytest.mark.parametrize(("image", "position"), [(0, 2), (1, 2), (2, 1), (3, 0)])
def test_an_image_that_is_not_finite_costs_no_other(
    teacher_path, data_path, image, position, dtype, attn_implementation
):
    """The vision tower sees the images of all rows as one batch: here of rows 4 (two), 3 and 0, longest first."""
    found = teacher(teacher_path, dtype=dtype, attn_implementation=attn_implementation)
    data, rows = Dataset(str(data_path)), [0, 3, 4]
    clean, spoiled = found.capture(data, rows), []

    def spoil(module, args, kwargs):
        pixels = args[0] if args else kwargs["pixel_values"]
        if len(pixels) == 4:  # the batch; not the row that is tried again without padding
            pixels[image] = torch.nan
        else:
            pixels[:] = torch.nan
        spoiled.append(len(pixels))

    found.vlm.model.model.vision_tower.register_forward_pre_hook(spoil, with_kwargs=True)
    check_only(position, found.capture(data, rows), clean)
    assert spoiled == [4] if position == 2 else spoiled[0] == 4 and len(spoiled) == 2


@attention
@pytest.mark.parametrize("chunk_logits", [V, 3 * V, 1 << 26])
def test_a_logit_that_is_not_finite_costs_no_other(teacher_path, data_path, chunk_logits, attn_implementation):
    """The top-k goes through the rows of a batch one after the other, in chunks that never cross them."""
    found = teacher(teacher_path, attn_implementation=attn_implementation)
    found = Teacher(found.vlm, CaptureSettings(**{**vars(found.settings), "chunk_logits": chunk_logits}))
    data, calls = Dataset(str(data_path)), []
    clean = found.capture(data, [4, 1])
    calls_of_first = -(-32 * V // max(V, chunk_logits)) if chunk_logits < 1 << 26 else 1

    def spoil(module, args, output):
        calls.append(len(output))
        if len(calls) == calls_of_first:  # the last chunk of row 4's vision tokens
            output[-1, 0] = torch.nan
        return output

    handle = found.vlm.model.lm_head.register_forward_hook(spoil)
    check_only(0, found.capture(data, [4, 1]), clean)
    handle.remove()


@attention
@dtypes
def test_padding_that_is_not_finite_costs_nothing(teacher_path, dataset, dtype, attn_implementation):
    """Attention gives padding a weight of zero, but zero times NaN is NaN: such rows go through again alone."""
    found = teacher(teacher_path, dtype=dtype, attn_implementation=attn_implementation)
    alone = teacher(teacher_path, 1, dtype=dtype, attn_implementation=attn_implementation).capture(dataset, EVERY)
    with torch.no_grad():
        found.vlm.model.get_input_embeddings().weight[found.pad_token_id] = torch.nan
    for result, expected in zip(found.capture(dataset, EVERY), alone, strict=True):
        assert result.reason == ""
        assert error_of(numbers(result.record), numbers(expected.record)) == 0


def test_a_row_beyond_the_budget_is_a_batch_of_its_own(teacher_path, dataset):
    """The longest has 99 tokens and no image; the others share what they fit in, as without it."""
    found, shapes = teacher(teacher_path, 50), []
    found.vlm.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    captured = found.capture(dataset, EVERY)
    assert shapes == [(1, 99), (1, 57), (1, 45), (1, 41), (1, 30), (1, 26), (2, 24), (1, 5)]
    assert {result.reason for result in captured} == {""}
    alone = teacher(teacher_path, 1).capture(dataset, [7])[0]
    assert error_of(numbers(captured[7].record), numbers(alone.record)) == 0


def test_token_tensors_of_some_samples_only_are_refused():
    """Padded rows are concatenated: if one were missing, the rows of the next sample would move up."""

    class Item:
        def __init__(self, **inputs):
            self.n_tokens, self.inputs = 3, {"input_ids": torch.ones(1, 3), **inputs}

    with pytest.raises(ModelError, match="'token_type_ids' for only 1 of the 2 samples"):
        collate([Item(), Item(token_type_ids=torch.ones(1, 3))], 0)
