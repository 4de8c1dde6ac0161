import torch

from emkd.samples import Dataset
from emkd.samples.encode import Encoder
from emkd.vlm import load
from emkd.vlm.affinity import affinity
from emkd.vlm.forward import collate, keep_last_hidden_state, last_hidden_state, lm_logits


def encoded(vlm, data_path):
    dataset, encoder = Dataset(str(data_path)), Encoder(vlm.processor, vlm.image_token_id)
    return [encoder(dataset.sample(n)) for n in range(dataset.n_rows)]


def test_a_batch_gives_what_samples_give_alone(teacher_path, data_path):
    vlm = load(str(teacher_path))
    items = encoded(vlm, data_path)
    with torch.no_grad():
        together = last_hidden_state(vlm.model, collate(items, 0))
        for item, states in zip(items, together, strict=True):
            alone = last_hidden_state(vlm.model, collate([item], 0))[0]
            torch.testing.assert_close(states[: item.n_tokens], alone, rtol=1e-5, atol=1e-5)


def test_collate_pads_tiles_and_tokens():
    class Item:
        def __init__(self, tokens: int, tiles: int) -> None:
            self.n_tokens = tokens
            self.inputs = {"input_ids": torch.ones(1, tokens), "pixel_values": torch.ones(1, tiles, 3, 2, 2)}

    batch = collate([Item(3, 2), Item(5, 4)], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[1, 1, 1, 9, 9], [1] * 5]
    assert batch["pixel_values"].shape == (2, 4, 3, 2, 2)
    assert float(batch["pixel_values"][0, 2:].abs().sum()) == 0


def test_kept_hidden_states_are_those_of_the_call(teacher_path, data_path):
    vlm = load(str(teacher_path))
    batch = collate(encoded(vlm, data_path)[:2], 0)
    with torch.no_grad(), keep_last_hidden_state(vlm.model) as kept:
        vlm.model(**batch)
    with torch.no_grad():
        assert torch.equal(kept[0], last_hidden_state(vlm.model, batch))
        vlm.model(**batch)
    assert len(kept) == 1, "nothing is kept after the block"


def test_logits_are_cut_to_the_tokenizer(teacher_path):
    vlm = load(str(teacher_path))
    hidden = torch.randn(3, 32)
    expected = hidden.double() @ vlm.model.lm_head.weight.double().T
    assert expected.shape[1] == 64
    torch.testing.assert_close(lm_logits(vlm.model, hidden, 28).double(), expected[:, :28], rtol=1e-5, atol=1e-5)


def test_affinity_is_the_cosine():
    text, vision = torch.randn(4, 8), torch.randn(3, 8)
    expected = torch.nn.functional.cosine_similarity(text.double()[:, None], vision.double()[None], dim=2)
    torch.testing.assert_close(affinity(text, vision).double(), expected, rtol=1e-6, atol=1e-6)
    assert affinity(text.bfloat16(), vision.bfloat16()).dtype == torch.float32
