"""What a student takes of each rank: the arithmetic against measurements, and the tables of docs/training.md."""

import pytest

from benchmarks.common.random_llava import meta_model
from benchmarks.step import shard_memory, student_memory
from emkd.trainer.student.memory import Sizes, activations, sharded, whole
from emkd.trainer.student.sharding import blocks
from tests.figures import page, results, shard_memory_rows, table_rows, vision_share_rows

MEASURED = results("shard_memory")["shard_memory"]


def test_tables_of_the_page_are_computed_and_measured():
    rows = table_rows(page("docs/training.md"))
    for expected in (list(student_memory.rows()), list(shard_memory_rows()), list(vision_share_rows())):
        first = rows.index(expected[0])
        assert rows[first : first + len(expected)] == expected


@pytest.mark.parametrize("name", MEASURED)
def test_the_arithmetic_holds_to_measurements(name):
    """Of the sizes that were measured, computed again: to a fifth, and it falls with the ranks as they do."""
    head, n_ranks = name.split(", ")
    model = meta_model(shard_memory.shape(tied=head == "tied"))
    sizes, ranks = Sizes.of(model), int(n_ranks)
    assert sizes == Sizes(**MEASURED[name]["sizes"])
    expected = (sharded(sizes, ranks) if ranks > 1 else whole(sizes, 1)).total
    assert expected == MEASURED[name]["expected"]
    assert 0.95 * expected <= MEASURED[name]["peak"] <= 1.2 * expected


@pytest.mark.parametrize("head", ["own head", "tied"])
def test_what_is_divided_falls_as_one_over_the_ranks(head):
    """From two to four ranks, a quarter of all weights, gradients and moments is saved."""
    two, four = (MEASURED[f"{head}, {n}"] for n in (2, 4))
    divided = 16 * two["sizes"]["all"]
    assert two["peak"] - four["peak"] == pytest.approx(divided / 4, rel=0.2)


def test_the_page_says_how_many_parameters_were_measured():
    own, tied = (round(MEASURED[f"{head}, 1"]["sizes"]["all"] / 1e6) for head in ("own head", "tied"))
    said = " ".join(page("docs/training.md").split())
    assert f"student of {own} million parameters, or {tied} million with one matrix" in said


def test_counts_by_hand():
    model = meta_model(shard_memory.shape(tied=True))
    sizes = Sizes.of(model)
    text, tower = model.model.language_model, model.model.vision_tower
    layer = 4 * 768 * 768 + 3 * 768 + 3 * 768 * 5120 + 2 * 768  # queries to output, biases, three of the MLP, two norms
    assert sizes.block == layer
    in_blocks = 12 * layer + 2 * sum(p.numel() for p in tower.encoder.layers[0].parameters())
    assert sizes.all - sizes.others == in_blocks
    assert sizes.tied_head == text.embed_tokens.weight.numel() == 32_768 * 768
    text.requires_grad_(False)
    frozen = Sizes.of(model)
    assert (frozen.all, frozen.tied_head, frozen.block) == (sizes.all, 0, sizes.block)
    assert frozen.trainable == sizes.trainable - sum(p.numel() for p in text.parameters())
    assert frozen.block_trainable == sum(p.numel() for p in tower.encoder.layers[0].parameters())


def test_blocks_are_layers_of_both_models():
    names = [name for name, _ in blocks(meta_model(shard_memory.shape(tied=False)))]
    assert len(names) == 12 + 2
    assert names[0].startswith("model.vision_tower.")
    assert names[-1] == "model.language_model.layers.11"


def test_activations():
    """Of two layers, 10 tokens of width 4, 2 bytes a number."""
    assert activations(10, 4, 2, checkpointed=False) == 2 * 34 * 40
    assert activations(10, 4, 2, checkpointed=True) == 2 * 2 * 40 + 34 * 40
