"""vision_tower, projector, language_model and lm_head of all ten families, against a list written by hand."""

import pytest
import torch
import transformers as hf

from emkd.commands import choices
from emkd.errors import ModelError, UsageError
from emkd.recipes import recipe_names
from emkd.trainer.recipe.recipe import LoraRecipe, load_recipe
from emkd.trainer.student.lora import add_lora
from emkd.trainer.student.parameters import freeze, parameter_groups, prefixes_of
from emkd.vlm.parts import PARTS, part_prefixes
from emkd.vlm.pooling import pooled
from tests import families
from tests.families import others
from tests.figures import page, table_rows

LLAVA = {
    "vision_tower": ["model.vision_tower"],
    "projector": ["model.multi_modal_projector"],
    "language_model": ["model.language_model"],
}
WITH_NEWLINE = LLAVA | {"projector": ["model.multi_modal_projector", "model.image_newline"]}
QWEN2 = {
    "vision_tower": ["model.visual.patch_embed", "model.visual.blocks"],
    "projector": ["model.visual.merger"],
    "language_model": ["model.language_model"],
}
QWEN3 = QWEN2 | {
    "vision_tower": ["model.visual.patch_embed", "model.visual.pos_embed", "model.visual.blocks"],
    "projector": ["model.visual.merger", "model.visual.deepstack_merger_list"],
}
IDEFICS = {
    "vision_tower": ["model.vision_model"],
    "projector": ["model.connector"],
    "language_model": ["model.text_model"],
}
LISTED = {
    "llava": LLAVA,
    "llava_next": WITH_NEWLINE,
    "llava_onevision": WITH_NEWLINE,
    "qwen2_vl": QWEN2,
    "qwen2_5_vl": QWEN2,
    "qwen3_vl": QWEN3,
    "internvl": LLAVA,
    "idefics3": IDEFICS,
    "smolvlm": IDEFICS,
    "gemma3": LLAVA,
}


def new_model(family, make=None, **text):
    config, processor = (make or families.FAMILIES[family])(48)
    for name, value in text.items():
        setattr(config, name, value)
        setattr(config.get_text_config(), name, value)
    torch.manual_seed(0)
    return hf.AutoModelForImageTextToText.from_config(config), processor


def names_of(model, part):
    prefixes = part_prefixes(model, part)
    return {name for name, _ in model.named_parameters(remove_duplicate=False) if name.startswith(prefixes)}


def listed(model, family, part):
    """The names of the parameters below the modules that the list has."""
    modules = {**LISTED[family], "lm_head": ["lm_head"]}[part]
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return {name for name in names for module in modules if name == module or name.startswith(f"{module}.")}


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_each_parameter_is_of_the_part_that_the_list_says(family, window):
    model, processor = new_model(family)
    model = pooled(model, processor, window)
    found = {part: names_of(model, part) for part in PARTS}
    assert found == {part: listed(model, family, part) for part in PARTS}
    assert all(found.values())
    every = [name for names in found.values() for name in names]
    assert sorted(every) == sorted(name for name, _ in model.named_parameters()), "each once"


def test_the_list_is_that_of_the_documentation():
    rows = [row.strip("| ").split(" | ") for row in table_rows(page("docs/families.md"))]
    table = {
        family: dict(zip(PARTS, ([n.strip("`") for n in cell.split(", ")] for cell in cells), strict=False))
        for names, *cells in rows
        if len(cells) == 3 and cells[0].startswith("`model.")
        for family in names.replace("`", "").split(", ")
    }
    assert table == LISTED
    assert choices.PARTS == PARTS


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_recipe_freezes_rates_and_adds_lora_by_the_same_names(family):
    model, _ = new_model(family)
    freeze(model, ["vision_tower"])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == listed(model, family, "vision_tower")
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, {"projector": 1e-3, "lm_head": 1e-4}, (), 0.0)
    rated = {names[id(p)]: group.get("lr") for group in groups for p in group["params"]}
    for part, rate in {"projector": 1e-3, "lm_head": 1e-4, "language_model": None}.items():
        assert {rated[name] for name in listed(model, family, part)} == {rate}
    add_lora(model, LoraRecipe(r=2, modules=("language_model", "projector", "lm_head")))
    below = tuple(module for part in ("language_model", "projector") for module in LISTED[family][part])
    additions = {name for name, p in model.named_parameters() if p.requires_grad}
    assert additions
    assert all(".lora_" in name and name.startswith(below) for name in additions)
    assert any(name.startswith(LISTED[family]["language_model"][0]) for name in additions)


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("recipe", [name for name in recipe_names() if name.startswith("phase")])
def test_the_recipes_name_parts_of_every_family(recipe, family):
    student = load_recipe(recipe).student
    model, _ = new_model(family)
    freeze(model, student.freeze)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    if recipe == "phase1-align":
        assert learning == listed(model, family, "projector")
    else:
        parts = set(PARTS) - set(student.freeze)
        assert learning == set().union(*(listed(model, family, part) for part in parts))
    for module in student.learning_rates:
        assert prefixes_of(model, module, "x") == part_prefixes(model, "vision_tower")


def test_a_tied_head_is_the_embeddings():
    model, _ = new_model("gemma3", tie_word_embeddings=True)
    model.tie_weights()
    freeze(model, ["lm_head"])
    assert not model.model.language_model.embed_tokens.weight.requires_grad
    assert names_of(model, "lm_head") == {"lm_head.weight"}


def test_the_longest_prefix_decides_between_a_part_and_a_prefix():
    model, _ = new_model("qwen3_vl")
    rates = {"vision_tower": 1e-4, "model.visual.blocks.1": 2e-4, "model.visual": 3e-4}
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, rates, (), 0.0)
    rated = {names[id(p)]: group.get("lr") for group in groups for p in group["params"]}
    assert rated["model.visual.blocks.0.attn.qkv.weight"] == 1e-4
    assert rated["model.visual.blocks.1.attn.qkv.weight"] == 2e-4
    assert rated["model.visual.merger.norm.weight"] == 3e-4
    assert rated["lm_head.weight"] is None


def test_two_names_of_one_module_with_two_rates_are_refused():
    model, _ = new_model("llava")
    parameter_groups(model, {"vision_tower": 1e-4, "model.vision_tower.": 1e-4}, (), 0.0)
    with pytest.raises(UsageError, match=r"'model.vision_tower.': .* has the learning rate 0.0001 as well"):
        parameter_groups(model, {"vision_tower": 1e-4, "model.vision_tower.": 2e-4}, (), 0.0)


def test_other_families_are_searched_in_the_same_way():
    model, _ = new_model("mistral3", others.mistral3)
    assert part_prefixes(model, "vision_tower") == ("model.vision_tower.",)
    assert part_prefixes(model, "projector") == ("model.multi_modal_projector.",)


def test_a_model_with_one_more_part_is_refused_and_prefixes_still_work():
    model, _ = new_model("llava")
    model.model.audio_tower = hf.SiglipVisionModel(families.siglip())
    with pytest.raises(ModelError, match="has a SiglipVisionModel besides its vision tower and its language model"):
        part_prefixes(model, "projector")
    with pytest.raises(UsageError, match=r"freeze 'projector': .*Prefixes of names work as well: .*model.audio_tower"):
        freeze(model, ["projector"])
    assert part_prefixes(model, "lm_head") == ("lm_head.",)
    freeze(model, ["model.audio_tower"])


def test_a_model_that_is_no_vision_language_model_is_refused():
    model = hf.Qwen2ForCausalLM(families.qwen2(48))
    for part in ("vision_tower", "projector", "language_model"):
        with pytest.raises(UsageError, match=f"freeze '{part}': .*Qwen2ForCausalLM"):
            freeze(model, [part])


def test_a_wrong_name_is_told_the_nearest_and_all():
    model, _ = new_model("idefics3")
    with pytest.raises(UsageError, match=r"did you mean 'vision_tower'\? Expected one of vision_tower, projector"):
        freeze(model, ["vision_towr"])
    with pytest.raises(UsageError, match=r"lm_head.weight, model.connector, model.text_model, model.vision_model"):
        freeze(model, ["model.language_model"])
