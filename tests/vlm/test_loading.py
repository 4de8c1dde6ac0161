import json

import pytest
from safetensors.torch import load_file, save_file

from emkd.errors import InputNotFoundError, ModelError
from emkd.vlm import load
from emkd.vlm.identity import licence, tokenizer_json, weights_sha256
from emkd.vlm.loading import resolve
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
