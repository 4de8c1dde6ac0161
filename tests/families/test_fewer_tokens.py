"""Vision tokens that are averaged, against means written down naively."""

import io
from typing import Any

import pytest
import torch
from PIL import Image

from emkd.errors import ModelError, UsageError
from emkd.vlm import load
from emkd.vlm.pooling import pooled
from tests import families, tiny


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"], indirect=True)
def test_qwens_of_fewer_tokens_take_no_videos(student):
    changed = load(str(student))
    changed.model = pooled(changed.model, changed.processor, 2)
    with pytest.raises(NotImplementedError, match="takes images, not videos"):
        changed.model.get_video_features(torch.zeros(4, 8), torch.tensor([[1, 4, 4]]))


@pytest.mark.parametrize("family", ["internvl"], indirect=True)
def test_the_config_counts_what_the_processor_writes(student):
    changed = load(str(student))
    changed.model = pooled(changed.model, changed.processor, 2)
    assert changed.model.config.image_seq_length == changed.processor.image_seq_length == 1


def features(loaded: Any, height: int, width: int) -> torch.Tensor:
    """[n, d] what the language model is given of one picture."""
    picture = Image.open(io.BytesIO(tiny.png(3, height, width))).convert("RGB")
    text = families.PLACEHOLDERS.get(loaded.model.config.model_type.removesuffix("_pooled"), "<image>")
    inputs = dict(loaded.processor(text=[text], images=[picture], return_tensors="pt"))
    places = int((inputs.pop("input_ids") == loaded.image_token_id).sum())
    wanted = ("pixel_values", "image_sizes", "batch_num_images", "pixel_attention_mask")
    with torch.no_grad():
        found = loaded.model.get_image_features(**{n: inputs[n] for n in wanted if n in inputs}).pooler_output
    found = torch.cat([one.reshape(-1, one.shape[-1]) for one in found])
    assert len(found) == places, "as many placeholders as there are vision tokens"
    return found


def blocks(grid: torch.Tensor) -> torch.Tensor:
    """[H, W, d] -> [H/2, W/2, d], naive means of 2 x 2 neighbours."""
    return torch.stack(
        [
            torch.stack([grid[i : i + 2, j : j + 2].mean((0, 1)) for j in range(0, grid.shape[1], 2)])
            for i in range(0, grid.shape[0], 2)
        ]
    )


@pytest.mark.parametrize("family", ["llava", "internvl", "idefics3", "smolvlm"], indirect=True)
def test_average_of_each_tile(student):
    plain, changed = load(str(student)), load(str(student))
    changed.model = pooled(changed.model, changed.processor, 2)
    before, after = features(plain, 40, 24), features(changed, 40, 24)
    side = {"llava": 4}.get(plain.model.config.model_type, 2)
    tiles = before.reshape(-1, side, side, before.shape[-1])
    torch.testing.assert_close(after, torch.cat([blocks(tile).flatten(0, 1) for tile in tiles]))


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"], indirect=True)
@pytest.mark.parametrize(("height", "width"), [(40, 40), (20, 40), (40, 20)])
def test_average_of_tiles_with_newline_tokens(student, height, width):
    """An overview of 4 x 4, then all tiles as one grid of which each row ends in a newline token."""
    plain, changed = load(str(student)), load(str(student))
    changed.model = pooled(changed.model, changed.processor, 2)
    before, after = features(plain, height, width), features(changed, height, width)
    rows, columns = height // families.PATCH, width // families.PATCH
    overview, tiles = before[:16].reshape(4, 4, -1), before[16:].reshape(rows, columns + 1, -1)
    newline = tiles[:1, -1:].expand(rows // 2, 1, -1)
    expected = torch.cat([blocks(tiles[:, :-1]), newline], dim=1)
    torch.testing.assert_close(after, torch.cat([blocks(overview).flatten(0, 1), expected.flatten(0, 1)]))


@pytest.mark.parametrize("family", ["gemma3"], indirect=True)
def test_average_before_the_projector(student):
    """By its own number of tokens: nothing is saved that transformers does not know."""
    loaded = load(str(student))
    loaded.model = pooled(loaded.model, loaded.processor, 2)
    assert type(loaded.model).__module__.startswith("transformers.")
    assert (loaded.model.config.mm_tokens_per_image, loaded.model.config.vision_pool) == (1, 2)
    assert len(features(loaded, 24, 24)) == 1
    assert pooled(loaded.model, loaded.processor, 2) is loaded.model
    with pytest.raises(UsageError, match="averages 2 x 2 tokens already"):
        pooled(loaded.model, loaded.processor, 4)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"], indirect=True)
@pytest.mark.parametrize(("height", "width"), [(40, 40), (24, 40), (30, 30), (20, 20)])
def test_average_of_a_grid_of_any_sides(student, height, width):
    """Windows at the edges average the tokens that they contain; Qwen3's deepstack features are averaged as well."""
    plain, changed = load(str(student)), load(str(student))
    changed.model = pooled(changed.model, changed.processor, 2)
    picture = Image.open(io.BytesIO(tiny.png(3, height, width))).convert("RGB")
    inputs = plain.processor(text=["<|image_pad|>"], images=[picture], return_tensors="pt")
    ((_, rows, columns),) = (inputs["image_grid_thw"] // torch.tensor([1, 2, 2])).tolist()
    given = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    with torch.no_grad():
        before, after = (one.model.get_image_features(**given) for one in (plain, changed))

    def expected(one: torch.Tensor) -> torch.Tensor:
        grid = one.reshape(rows, columns, -1)
        windows = [grid[i : i + 2, j : j + 2] for i in range(0, rows, 2) for j in range(0, columns, 2)]
        return torch.stack([window.mean((0, 1)) for window in windows])

    torch.testing.assert_close(after.pooler_output[0], expected(before.pooler_output[0]))
    assert ("deepstack_features" in before) == (plain.model.config.model_type == "qwen3_vl")
    for layer, other in zip(before.get("deepstack_features", []), after.get("deepstack_features", []), strict=True):
        torch.testing.assert_close(other[0], expected(layer[0]))
    ids = changed.processor(text=["<|image_pad|>"], images=[picture], return_tensors="pt")["input_ids"]
    assert int((ids == changed.image_token_id).sum()) == len(after.pooler_output[0])


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"], indirect=True)
def test_positions_are_those_of_a_smaller_picture(student):
    """An image of 4 x 3 tokens, averaged to 2 x 2, between two words: rows and columns count 0, 1, and the next word's
    position follows."""
    changed = load(str(student))
    changed.model = pooled(changed.model, changed.processor, 2)
    picture = Image.open(io.BytesIO(tiny.png(3, 40, 30))).convert("RGB")
    inputs = changed.processor(text=["red <|image_pad|> blue"], images=[picture], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 8, 6]]
    positions, _ = changed.model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
    )
    assert positions[:, 0].tolist() == [[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]]


@pytest.mark.parametrize("family", ["llava_next"], indirect=True)
def test_who_cannot_average_says_so(student):
    loaded = load(str(student))
    loaded.model.config.model_type = "another"
    with pytest.raises(ModelError, match="--vision-pool works on models of type llava, .*, not on 'another'"):
        pooled(loaded.model, loaded.processor, 2)
