"""The command line and the settings that it makes have the same defaults."""

import dataclasses
import inspect
import re
import subprocess
import sys

import pytest
import typer

from emkd.cli import app
from emkd.demo.run import run_demo
from emkd.inspection.compare.live_teacher import LiveSettings
from emkd.pipeline import JobSettings
from emkd.trainer import TrainSettings

HEAVY = ("torch", "transformers", "ray", "zarr", "pyarrow", "numpy")


def options(command):
    return {option.name: option for option in typer.main.get_command(app).commands[command].params}


def settings_defaults(settings):
    """Name -> default of the fields that have one."""
    return {
        field.name: field.default for field in dataclasses.fields(settings) if field.default is not dataclasses.MISSING
    }


@pytest.mark.parametrize(("command", "settings"), [("cache-teacher", JobSettings), ("train-student", TrainSettings)])
def test_defaults_are_those_of_the_settings(command, settings):
    found, expected = options(command), settings_defaults(settings)
    assert {name: found[name].default for name in expected} == expected
    required = {field.name for field in dataclasses.fields(settings)} - expected.keys() - {"recipe"}
    assert required == {name for name, option in found.items() if option.required}


def test_every_setting_of_the_job_has_its_flag_and_reaches_it(monkeypatch):
    """Each flag is given a value that no other has."""
    names = [field.name for field in dataclasses.fields(JobSettings)]
    given = {name: object() for name in names} | {"logit_error": "none"}  # which is read as a number otherwise
    seen = {}

    class Caught(Exception):
        pass

    def catch(**settings):
        seen.update(settings)
        raise Caught

    monkeypatch.setattr("emkd.commands.teacher.check_paths", lambda **paths: None)
    monkeypatch.setattr("emkd.commands.teacher.JobSettings", catch)
    from emkd.commands.teacher import cache_teacher

    with pytest.raises(Caught):
        cache_teacher(**given)
    assert seen == given


def test_the_number_of_compared_samples():
    """A flag whose help states the default: it must be None itself, to be seen as not given."""
    option = options("inspect")["samples"]
    assert option.default is None
    assert re.search(r"\(default (\d+)\)", option.help)[1] == str(LiveSettings.samples)


def test_defaults_of_the_demonstration():
    expected = {name: found.default for name, found in inspect.signature(run_demo).parameters.items() if name != "out"}
    assert {name: options("demo")[name].default for name in expected} == expected


@pytest.mark.parametrize("line", ["import emkd.cli", "from emkd.cli import main; main(['cache-teacher', '--help'])"])
def test_the_command_line_starts_without_what_takes_long(line):
    code = f"import sys\ntry: {line}\nfinally: print([m for m in {HEAVY} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
