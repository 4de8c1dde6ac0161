"""What a shell shows: choices in --help, completion, and the help of `emkd` alone."""

import os
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest

from emkd.cli import main
from emkd.commands import choices
from emkd.pipeline.settings import DTYPES
from emkd.recipes import recipe_names
from emkd.storage.manifest import manifest
from emkd.storage.precision import AffinityPrecision, LogitsPrecision
from emkd.trainer.losses.divergence import Kind
from emkd.trainer.matching.assignment import Solver
from emkd.trainer.matching.match import Matching
from emkd.trainer.recipe.recipe import LossRecipe


def exits(*arguments):
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    return left.value.code


@pytest.mark.parametrize(
    ("shown", "known"),
    [
        (choices.AffinityForm, manifest.AffinityForm),
        (choices.Compression, manifest.Compression),
        (choices.LogitsPrecision, LogitsPrecision),
        (choices.AffinityPrecision, AffinityPrecision),
        (choices.Divergence, Kind),
        (choices.Matching, Matching),
        (choices.Solver, Solver),
        (choices.Tail, get_type_hints(LossRecipe)["tail"]),
    ],
)
def test_the_choices_are_those_of_the_packages(shown, known):
    assert sorted(get_args(shown)) == sorted(get_args(known))
    assert get_args(choices.Dtype) == DTYPES


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (
            "cache-teacher",
            [
                "stored|codes",
                "bfloat16|float16|float32|step0.1|step0.2",
                "int8|float16|float32",
                "zstd|lz4",
                "auto|float32|bfloat16|float16",
            ],
        ),
        (
            "train-student",
            [
                "reverse_kl|forward_kl|jsd",
                "auto|codes|uniform|bucket",
                "logits|pooled|random",
                "scipy|cuda",
            ],
        ),
    ],
)
def test_every_option_with_a_few_values_shows_them(command, shown, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # nothing is wrapped
    assert exits(command, "--help") == 0
    help_text = capfd.readouterr().out
    assert all(f"<{values}>" in help_text for values in shown)


def test_emkd_alone_prints_the_help(capfd):
    assert exits() == 2
    shown = "".join(capfd.readouterr())
    assert "Usage: " in shown
    assert "train-student" in shown
    assert "see --help" not in shown


def completed(*words):
    """What a shell offers behind these words."""
    line = " ".join(("emkd", *words))
    found = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'emkd'; from emkd.cli import main; main()"],
        env={**os.environ, "_EMKD_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words))},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in found.stderr
    return found.stdout.split()


def test_a_shell_completes_commands_options_choices_and_recipes():
    assert completed("in") == ["init-student", "inspect"]
    assert "--answer-top-k" in completed("cache-teacher", "--answer")
    assert completed("cache-teacher", "--compression", "l") == ["lz4"]
    assert completed("train-student", "--recipe", "phase2") == [n for n in recipe_names() if n.startswith("phase2")]
    assert completed("train-student", "--freeze", "v") == ["vision_tower"]
    assert completed("recipes", "demo") == ["demo", "demo-align"]


def test_typers_own_options_for_completion_are_there(capfd):
    assert exits("--help") == 0
    out = capfd.readouterr().out
    assert "--install-completion" in out
    assert "--show-completion" in out
