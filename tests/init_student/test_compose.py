"""A composed student: every weight has the right name, nothing is dropped silently, and both phases of the paper's
recipe train it."""

import json
import shutil

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from emkd.cli import main
from emkd.errors import ModelError, TokenizerMismatchError, UsageError
from emkd.init_student.compose import compose, save
from emkd.trainer import TrainSettings, load_recipe, train_student, with_flags
from emkd.vlm import load
from tests import families, tiny
from tests.families.naive import ROWS
from tests.trainer.test_recipes import SHORT

pytestmark = pytest.mark.slow

SIDE, PATCH = 40, 5  # 8 x 8 patches a tile, 16 tokens once averaged


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """With its text part, as on the hub."""
    folder = tmp_path_factory.mktemp("siglip")
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = hf.SiglipConfig(
        vision_config={**vision, "image_size": SIDE, "patch_size": PATCH},
        text_config={**vision, "vocab_size": 50, "max_position_embeddings": 16},
    )
    torch.manual_seed(1)
    hf.SiglipModel(config).save_pretrained(folder)
    hf.SiglipImageProcessor(image_mean=[0.4] * 3, image_std=[0.3] * 3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Its first token is no patch."""
    folder = tmp_path_factory.mktemp("clip")
    config = hf.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    hf.CLIPVisionModel(config).save_pretrained(folder)
    hf.CLIPImageProcessor().save_pretrained(folder)
    return folder


def language(folder, rows=families.LM_HEAD_ROWS, tied=True):
    torch.manual_seed(2)
    settings = {**families.text_settings(24), "vocab_size": rows, "head_dim": 12, "tie_word_embeddings": tied}
    hf.Qwen3ForCausalLM(hf.Qwen3Config(**settings)).save_pretrained(folder)
    hf.GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=7).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "own-head"])
def qwen3(request, tmp_path_factory):
    return language(tmp_path_factory.mktemp("qwen3"), tied=request.param)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return families.save("qwen2_vl", tmp_path_factory.mktemp("teacher"), seed=1)


def test_every_weight_is_in_its_place(siglip, qwen3, teacher):
    made = compose(str(siglip), str(qwen3), str(teacher))
    tower = hf.SiglipVisionModel.from_pretrained(siglip).state_dict()
    text = hf.Qwen3ForCausalLM.from_pretrained(qwen3).state_dict()
    found = made.model.state_dict()
    expected = {f"model.vision_tower.{name}": weight for name, weight in tower.items()}
    expected |= {
        f"model.language_model.{name.removeprefix('model.')}": w for name, w in text.items() if name != "lm_head.weight"
    }
    expected |= {"lm_head.weight": text["lm_head.weight"]}
    assert set(found) - set(expected) == set(made.random)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert {name.rsplit(".", 1)[0] for name in made.random} == {
        "model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2", "model",
    }  # fmt: skip
    n_text = sum(name.startswith("text_model.") for name in hf.SiglipModel.from_pretrained(siglip).state_dict())
    assert made.unused == {"text_model": n_text, "logit_scale": 1, "logit_bias": 1}
    assert list(made.processor.image_processor.image_mean) == [0.4] * 3
    assert list(made.processor.image_processor.image_std) == [0.3] * 3
    same = made.model.lm_head.weight is made.model.get_input_embeddings().weight
    assert same == hf.AutoConfig.from_pretrained(qwen3).tie_word_embeddings
    answers = made.model.generation_config
    assert answers.temperature == 0.6, "it answers as the language model did"
    assert answers.eos_token_id == sorted({7, families.ID["<end>"]}), "and ends where the teacher's answers do, too"


def test_another_layer_of_the_tower(siglip, teacher, tmp_path):
    text = str(language(tmp_path / "text"))
    models = [compose(str(siglip), text, str(teacher), layer=layer).model for layer in (-1, -2)]
    assert [model.config.vision_feature_layer for model in models] == [-1, -2]
    pixels = torch.randn(1, 3, 3, SIDE, SIDE)
    sizes = torch.tensor([[SIDE, 2 * SIDE]])
    with torch.no_grad():
        last, before = (model.get_image_features(pixels, sizes).pooler_output[0] for model in models)
    assert not torch.allclose(last, before)


def test_the_seed_decides_all_that_is_new(siglip, teacher, tmp_path):
    """Including the rows for the teacher's ids, independent of earlier random draws."""
    text = language(tmp_path / "text", rows=40, tied=False)
    one, same, other = (
        compose(str(siglip), str(text), str(teacher), seed=seed).model.state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    for name in ("model.multi_modal_projector.linear_1.weight", "lm_head.weight"):
        assert not torch.equal(one[name], other[name])


def test_rows_for_the_teachers_ids_are_added_and_told(siglip, teacher, tmp_path):
    text = language(tmp_path / "text", rows=40, tied=False)
    made = compose(str(siglip), str(text), str(teacher))
    assert made.model.get_output_embeddings().weight.shape == (128, 24)
    assert made.random["rows of the embedding and of the LM head"] == (88, 24)
    whole = hf.Qwen3ForCausalLM.from_pretrained(text).state_dict()
    assert torch.equal(made.model.state_dict()["lm_head.weight"][:40], whole["lm_head.weight"])


@pytest.mark.parametrize("tower", ["siglip", "clip"])
def test_by_commands_and_through_both_phases(tower, request, teacher, tmp_path, capfd):
    vision, text = request.getfixturevalue(tower), language(tmp_path / "text")
    call = [
        "init-student",
        "--vision-tower",
        vision,
        "--language-model",
        text,
        "--like",
        teacher,
        "--output",
        tmp_path / "s",
    ]
    assert run(*call) == 0
    said = capfd.readouterr().out
    assert "random: model.multi_modal_projector.linear_1.weight [24, 32]" in said
    assert ("not used: " in said) == (tower == "siglip")
    assert run(*call) == 2
    assert "exists and is not an empty folder" in capfd.readouterr().err
    model, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "s", output_loading_info=True)
    assert not report["missing_keys"]
    assert type(model).__name__ == "PooledLlavaNextForConditionalGeneration"
    data = tiny.write_data(tmp_path / "rows.parquet", ROWS)
    cache = tiny.make_cache(teacher, data, tmp_path / "cache")
    phases = {"phase1-align": (tmp_path / "s", None), "phase2-emkd": (tmp_path / "phase1-align", str(cache))}
    for phase, (student, known) in phases.items():
        recipe = with_flags(load_recipe(phase), SHORT)
        metrics = train_student(
            TrainSettings(student=str(student), data=str(data), output=tmp_path / phase, cache=known, recipe=recipe)
        )
        assert metrics["train_loss"] > 0
    begun, aligned, trained = (load(str(tmp_path / name)) for name in ("s", *phases))
    before, between, after = (one.model.state_dict() for one in (begun, aligned, trained))
    moved = {name.split(".")[1] for name in before if not torch.equal(before[name], between[name])}
    assert moved == {"multi_modal_projector", "image_newline"}, "all that is new"
    assert any(not torch.equal(between[n], after[n]) for n in between if "language_model" in n)
    assert trained.processor.chat_template == families.template("qwen2_vl")


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


def test_tiles_and_tokens(siglip, teacher, tmp_path):
    """A picture of one shape of tiles: an overview of 4 x 4 tokens, and 4 rows of 8 and a newline."""
    made = compose(str(siglip), str(language(tmp_path / "text")), str(teacher))
    inputs = made.processor(text=["<|image_pad|>"], images=[torch.zeros(3, SIDE, 2 * SIDE)], return_tensors="pt")
    assert int((inputs["input_ids"] == made.model.config.image_token_id).sum()) == 16 + 4 * (8 + 1)
    with torch.no_grad():
        assert made.model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_like_a_teacher_of_any_family(siglip, family, tmp_path):
    """Whatever it writes around and within images."""
    teacher = families.save(family, tmp_path / "teacher", seed=1)
    made = compose(str(siglip), str(language(tmp_path / "text")), str(teacher))
    token = made.processor.tokenizer.convert_ids_to_tokens(made.model.config.image_token_id)
    assert made.processor.chat_template.count(token) == 1


def test_what_does_not_fit_is_said(siglip, teacher, tmp_path):
    text = str(language(tmp_path / "text"))
    with pytest.raises(
        UsageError, match=r"--vision-pool 3: a tile of this vision tower is 8 x 8 tokens; expected one of"
    ):
        compose(str(siglip), text, str(teacher), window=3)
    with pytest.raises(UsageError, match="--vision-layer -4: this vision tower has 3 layers; expected -3 to -1"):
        compose(str(siglip), text, str(teacher), layer=-4)
    with pytest.raises(ModelError, match="--vision-tower .*: a qwen3 has no .*, so it is not a vision transformer"):
        compose(text, text, str(teacher))
    with pytest.raises(
        ModelError, match=r"--vision-tower .*: it is a whole vision-language model \(qwen2_vl\); pass only its"
    ):
        compose(str(teacher), text, str(teacher))
    with pytest.raises(ModelError, match="--like .*(no processor for images and text|processor cannot be loaded)"):
        compose(str(siglip), text, text)
    with pytest.raises(ModelError, match="--language-model .*: it is a siglip, not a language model"):
        compose(str(siglip), str(siglip), str(teacher))
    bare = tmp_path / "bare"
    shutil.copytree(siglip, bare)
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match="has no image processor"):
        compose(str(bare), text, str(teacher))


def without(folder, copy, name):
    """A copy that lacks a weight."""
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    del weights[name]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    return str(copy)


def test_checkpoints_that_are_not_whole_are_refused(siglip, teacher, tmp_path):
    text = language(tmp_path / "text", tied=False)
    name = "vision_model.encoder.layers.0.mlp.fc1.bias"
    tower = without(siglip, tmp_path / "tower", name)
    with pytest.raises(
        ModelError, match="--vision-tower .*: 1 weights of a SiglipVisionModel are missing, for instance .*fc1.bias"
    ):
        compose(tower, str(text), str(teacher))
    headless = without(text, tmp_path / "headless", "lm_head.weight")
    with pytest.raises(ModelError, match="--language-model .*: 1 weights of a Qwen3ForCausalLM are missing"):
        compose(str(siglip), headless, str(teacher))
    weights = load_file(text / "model.safetensors")
    save_file(weights | {"model.more.weight": torch.ones(2)}, text / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"it has weights that a Qwen3ForCausalLM lacks \({'model': 1}\)"):
        compose(str(siglip), str(text), str(teacher))


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def tower_of(model, folder):
    model.save_pretrained(folder)
    hf.SiglipImageProcessor().save_pretrained(folder)
    return str(folder)


def test_towers_of_another_make_are_refused(siglip, teacher, tmp_path):
    text = str(language(tmp_path / "text"))
    registers = hf.Dinov2WithRegistersConfig(**SMALL, image_size=SIDE, patch_size=PATCH, num_register_tokens=4)
    dino = tower_of(hf.Dinov2WithRegistersModel(registers), tmp_path / "dino")
    with pytest.raises(ModelError, match="has 5 tokens besides its patches"):
        compose(dino, text, str(teacher))
    oblong = hf.InternVLVisionConfig(**SMALL, image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH])
    with pytest.raises(ModelError, match=r"its image_size is \[40, 40\]; expected one number"):
        compose(tower_of(hf.InternVLVisionModel(oblong), tmp_path / "internvl"), text, str(teacher))


@pytest.mark.parametrize(
    ("kind", "config", "reason"),
    [
        (hf.PhiForCausalLM, hf.PhiConfig(**SMALL, vocab_size=128), "no linear lm_head without a bias"),
        (hf.GPT2LMHeadModel, hf.GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=128), "cannot compose a LLaVA-NeXT"),
        (hf.GraniteForCausalLM, hf.GraniteConfig(**SMALL, vocab_size=128, logits_scaling=8.0), "does more after its LM"),
        (
            hf.Gemma2ForCausalLM,
            hf.Gemma2Config(**SMALL, head_dim=16, num_key_value_heads=1, vocab_size=128, final_logit_softcapping=0.1),
            "does more after its LM head",
        ),
    ],
    ids=["head with a bias", "other names", "scaled logits", "softcap"],
)  # fmt: skip
def test_language_models_of_another_make_are_refused(kind, config, reason, siglip, teacher, tmp_path):
    kind(config).save_pretrained(tmp_path / "text")
    with pytest.raises(ModelError, match=f"(--language-model .*: |){'.*'}{reason}"):
        compose(str(siglip), str(tmp_path / "text"), str(teacher))


def test_broken_checkpoints_are_said(siglip, teacher, tmp_path):
    text = str(language(tmp_path / "text"))

    def changed(name, **settings):
        folder = shutil.copytree(siglip, tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))
        return folder

    with pytest.raises(ModelError, match="--vision-tower .*: its config cannot be read"):
        compose(str(changed("unknown", model_type="foo")), text, str(teacher))
    vision = hf.SiglipConfig.from_pretrained(siglip).vision_config.to_dict()
    with pytest.raises(ModelError, match="--vision-tower .*: it cannot be loaded"):
        compose(str(changed("shapes", vision_config=vision | {"image_size": 2 * SIDE})), text, str(teacher))
    cut = changed("cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:500])
    with pytest.raises(ModelError, match="--vision-tower .*: it cannot be loaded"):
        compose(str(cut.parent), text, str(teacher))


def test_nothing_is_rounded(siglip, teacher, tmp_path):
    """A tower in float32 and a language model in bfloat16: both are there exactly."""
    text = language(tmp_path / "text")
    hf.Qwen3ForCausalLM.from_pretrained(text).to(torch.bfloat16).save_pretrained(text)
    found = compose(str(siglip), str(text), str(teacher)).model.state_dict()
    for name, weight in hf.SiglipVisionModel.from_pretrained(siglip).state_dict().items():
        assert torch.equal(found[f"model.vision_tower.{name}"], weight)
    rounded = hf.Qwen3ForCausalLM.from_pretrained(text, dtype="auto").state_dict()["model.norm.weight"]
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(found["model.language_model.norm.weight"], rounded.float())


def test_pixels_are_made_as_for_the_tower(siglip, teacher, tmp_path):
    folder = shutil.copytree(siglip, tmp_path / "tower")
    hf.SiglipImageProcessor(image_std=[0.2] * 3, resample=2, rescale_factor=0.01).save_pretrained(folder)
    made = compose(str(folder), str(language(tmp_path / "text")), str(teacher)).processor.image_processor
    assert (list(made.image_std), int(made.resample), made.rescale_factor) == ([0.2] * 3, 2, 0.01)


def test_teachers_that_it_cannot_be_like_are_refused(siglip, teacher, tmp_path):
    text = str(language(tmp_path / "text"))
    nameless = shutil.copytree(teacher, tmp_path / "nameless")
    shutil.copy(siglip / "config.json", nameless)
    with pytest.raises(ModelError, match="--like .*: its config names no image_token_id"):
        compose(str(siglip), text, str(nameless))
    blind = shutil.copytree(teacher, tmp_path / "blind")
    template = blind / "chat_template.jinja"
    template.write_text(template.read_text().replace(families.PLACEHOLDERS["qwen2_vl"], ""))
    with pytest.raises(TokenizerMismatchError, match="--like .*: the teacher's chat template writes '' for an image"):
        compose(str(siglip), text, str(blind))


def test_ids_of_the_language_model_mean_what_the_teachers_do(siglip, teacher, tmp_path):
    """Otherwise its embeddings would belong to other words."""
    text = language(tmp_path / "text")
    (note,) = compose(str(siglip), str(text), str(teacher)).notes
    assert "has no tokenizer.json: emkd cannot check that its ids mean the same" in note
    shutil.copy(teacher / "tokenizer.json", text)
    assert compose(str(siglip), str(text), str(teacher)).notes == ()
    content = json.loads((text / "tokenizer.json").read_text())
    ids = content["model"]["vocab"]
    ids["cat"], ids["dog"] = ids["dog"], ids["cat"]
    (text / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        TokenizerMismatchError, match="--language-model .*: its embeddings do not belong to the ids of --like .*'cat'"
    ):
        compose(str(siglip), str(text), str(teacher))


def test_a_student_is_saved_whole_or_not_at_all(siglip, teacher, tmp_path, monkeypatch):
    """Ctrl-C while it is written, and the same command again."""
    made = compose(str(siglip), str(language(tmp_path / "text")), str(teacher))
    output = tmp_path / "made" / "student"
    processors_own = type(made.processor).save_pretrained
    monkeypatch.setattr(type(made.processor), "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(made, output)
    assert list(output.parent.iterdir()) == []
    monkeypatch.setattr(type(made.processor), "save_pretrained", processors_own)
    save(made, output)
    assert [path.name for path in output.parent.iterdir()] == ["student"]
    load(str(output))


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_output_that_cannot_be_written_is_said_first(siglip, teacher, tmp_path, capfd):
    (tmp_path / "file").touch()
    call = ["--vision-tower", siglip, "--language-model", tmp_path / "nothing", "--like", teacher]
    assert run("init-student", *call, "--output", tmp_path / "file" / "student") == 2
    assert "student cannot be written" in capfd.readouterr().err
