"""What tests of stopping and resuming share."""

import json

import pytest
import yaml

from emkd.trainer import train_student
from tests import tiny
from tests.trainer.loop.runs import RECIPE, settings


@pytest.fixture(scope="module")
def dropout_student(tmp_path_factory):
    folder = tiny.save_model(tmp_path_factory.mktemp("student"), seed=2, hidden=24)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.2
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def inputs(dropout_student, data_path, cache_path, tmp_path_factory):
    """What each run is given but its output."""
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    return {"student": str(dropout_student), "data": str(data_path), "cache": str(cache_path), "recipe": recipe}


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    train_student(settings(inputs, output))
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-13"]
    return output
