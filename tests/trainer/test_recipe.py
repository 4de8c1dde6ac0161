import pytest
import yaml

from emkd.errors import InputNotFoundError, UsageError
from emkd.trainer.recipe import Recipe, load_recipe, make_recipe, with_flags


def test_defaults_are_the_papers():
    weights = Recipe().losses.weights
    assert (weights.alpha, weights.beta, weights.gamma) == (0.5, 0.25, 25.0)


def test_a_file_and_flags_over_it(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"losses": {"alpha": 0.3, "beta": 1.0}, "training": {"max_steps": 7}}))
    recipe = with_flags(load_recipe(path), {"losses.beta": 2.0, "training.seed": 3, "losses.gamma": None})
    assert (recipe.losses.alpha, recipe.losses.beta, recipe.losses.gamma) == (0.3, 2.0, 25.0)
    assert recipe.training == {"max_steps": 7, "seed": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"losses": {"alfa": 1}}, r"unknown key 'losses.alfa'; did you mean 'alpha'"),
        ({"loses": {}}, r"unknown key 'loses'; did you mean 'losses'"),
        ({"training": {"learnig_rate": 1}}, r"training.learnig_rate is no field .*did you mean 'learning_rate'"),
        ({"training": {"output_dir": "x"}}, r"training.output_dir cannot be set: use --output"),
        ({"training": {"auto_find_batch_size": True}}, "must not change its size"),
        ({"losses": {"alpha": 2}}, "losses.alpha: .*less than or equal to 1, got 2"),
        ({"losses": {"tail": "fat"}}, "losses.tail: .*'bucket' or 'uniform', got 'fat'"),
        ([1], "the recipe: .*valid dictionary"),
        ({"training": {"label_smoothing_factor": 0.1}}, "smoothing is none of them"),
    ],
)
def test_what_is_wrong_is_named(content, message):
    with pytest.raises(UsageError, match=message):
        make_recipe(content, "here")


def test_files(tmp_path):
    with pytest.raises(InputNotFoundError, match="no recipe at"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UsageError, match="not valid YAML"):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert load_recipe(tmp_path / "empty.yaml") == Recipe()


def test_numbers_as_people_write_them(tmp_path):
    """YAML 1.1 reads 2e-5 as a text and no as false."""
    (tmp_path / "r.yaml").write_text("training: {learning_rate: 2e-5, optim: sgd, save_strategy: no}")
    expected = {"learning_rate": 2e-5, "optim": "sgd", "save_strategy": "no"}
    assert load_recipe(tmp_path / "r.yaml").training == expected
    (tmp_path / "latin.yaml").write_bytes(b"training: {optim: \xe9}")
    with pytest.raises(UsageError, match="not valid YAML"):
        load_recipe(tmp_path / "latin.yaml")
