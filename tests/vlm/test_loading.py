import json
import shutil
import warnings

import pytest
from safetensors.torch import load_file, save_file

from emkd.errors import InputNotFoundError, ModelError
from emkd.vlm import load
from emkd.vlm.identity import licence, tokenizer_json, weights_sha256
from emkd.vlm.loading import load_model, resolve
from tests import tiny


def test_a_missing_weight_is_an_error_not_a_random_start(tmp_path):
    path = tiny.save_model(tmp_path / "model", seed=1, hidden=32)
    weights = load_file(path / "model.safetensors")
    del weights["language_model.lm_head.weight" if "language_model.lm_head.weight" in weights else "lm_head.weight"]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing .*lm_head"):
        load(str(path))


def test_wrong_folders(tmp_path):
    with pytest.raises(InputNotFoundError, match="without config.json"):
        load(str(tmp_path))
    with pytest.raises(InputNotFoundError, match="no model 'no/such-model'"):
        load("no/such-model")


def test_a_model_without_chat_template_is_refused(tmp_path):
    path = tiny.save_model(tmp_path / "model", seed=1, hidden=32)
    (path / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        load(str(path))


def test_pickled_weights_are_not_read(tmp_path):
    path = tiny.save_model(tmp_path / "model", seed=1, hidden=32)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(str(path))
    with pytest.raises(ModelError, match="does not read pickled weights"):
        weights_sha256(path)


def test_the_tokenizers_identity_is_blind_to_its_last_use(tmp_path):
    path = tiny.save_model(tmp_path / "model", seed=1, hidden=32)
    before = tokenizer_json(path)
    content = json.loads((path / "tokenizer.json").read_text())
    content["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}  # fmt: skip
    content["truncation"] = {"max_length": 9, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (path / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizer_json(path) == before


def test_weights_are_told_apart(tmp_path):
    one, other = (tiny.save_model(tmp_path / str(seed), seed=seed, hidden=32) for seed in (1, 2))
    assert weights_sha256(one) != weights_sha256(other)
    again = tiny.save_model(tmp_path / "again", seed=1, hidden=32)
    assert weights_sha256(again) == weights_sha256(one)


def test_licence_of_the_model_card(tmp_path):
    assert licence(tmp_path) is None
    (tmp_path / "README.md").write_text("---\ntags: x\nlicense: apache-2.0\n---\nlicense: mit\n")
    assert licence(tmp_path) == "apache-2.0"
    (tmp_path / "README.md").write_text("license: mit\n")
    assert licence(tmp_path) is None


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "a/b/c"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(name):
    with pytest.raises(InputNotFoundError, match="there is no such folder"):
        resolve(name)


@pytest.fixture
def with_adapter(tmp_path):
    """A model, and beside its weights the adapter that may or may not be merged into them."""
    from peft import LoraConfig, get_peft_model

    path = tiny.save_model(tmp_path / "model", seed=1, hidden=32)
    with warnings.catch_warnings():  # peft's own, about transformers
        warnings.simplefilter("ignore")
        model = get_peft_model(load(str(path)).model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        model.save_pretrained(tmp_path / "adapter")
    for file in (tmp_path / "adapter").glob("adapter_*"):
        shutil.copy(file, path)
    return path


def test_no_adapter_is_attached_that_nobody_named(with_adapter):
    """transformers attaches it where peft is installed: one folder, one hash of its weights, two models."""
    said = (
        r"holds an adapter \(adapter_config.json, adapter_model.safetensors\) beside the model.*remove adapter_config"
    )
    for use in (resolve, load):
        with pytest.raises(ModelError, match=said):
            use(str(with_adapter))
    with pytest.raises(ModelError, match=said):
        load_model(with_adapter, dtype="auto")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (with_adapter / name).unlink()
    assert not hasattr(load(str(with_adapter)).model, "peft_config")


def test_an_adapter_alone_is_no_model(with_adapter):
    (with_adapter / "config.json").unlink()
    with pytest.raises(ModelError, match="holds an adapter alone .*merge it into its base model"):
        resolve(str(with_adapter))


def test_v_is_the_largest_id_and_one(tmp_path):
    """A tokenizer of 26 tokens whose ids have a gap: the head's rows up to the largest id belong to it."""
    path = tiny.save_gapped(tmp_path / "model", seed=1, hidden=32)
    loaded = load(str(path))
    assert (len(loaded.processor.tokenizer), loaded.n_tokens) == (26, 56)
    small = tiny.save_gapped(tmp_path / "small", seed=1, hidden=32, lm_head_rows=55)
    with pytest.raises(ModelError, match="its LM head has 55 rows, and the tokenizer's largest id is 55"):
        load(str(small))
