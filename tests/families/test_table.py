"""The table says yes only if tests exist and passed."""

import re
from collections import Counter

import pytest
import transformers as hf

from tests import families
from tests.families import table as families_table

EXACT = families_table.EXACT


def test_a_test_that_failed_or_is_missing_is_a_no():
    outcomes = {f"{EXACT}[llava-1]": True, f"{EXACT}[llava-2]": True, "test_average_of_each_tile[llava]": False}
    outcomes |= {
        f"{EXACT}[internvl-2]": True,
        f"{EXACT}[idefics3-2]": True,
        "test_average_of_each_tile[idefics3]": True,
    }
    rows = families_table.table(outcomes).splitlines()
    assert "| `llava` | yes | no | no | no |" in rows
    assert "| `gemma3` | no | no | no | no |" in rows
    assert "| `llava_next` | no | no | no | no |" in rows
    assert "| `internvl` | no | no | no | no |" in rows, "one of the two that are wanted is missing"
    assert "| `idefics3` | no | yes | no | no |" in rows


def test_the_page_has_every_family_and_column():
    page = families_table.PAGE.read_text()
    assert re.findall(r"^\| `(\w+)`(?: \| (?:yes|no)){4} \|$", page, re.MULTILINE) == list(families.FAMILIES)
    assert "| family | " + " | ".join(families_table.COLUMNS) + " |" in page


def modules_of(family):
    """Of the page: names of vision tower, projector and language model."""
    page = families_table.PAGE.read_text()
    (row,) = [line for line in page.splitlines() if f"`{family}`" in line and "`model." in line]
    return [re.findall(r"`([\w.]+)`", cell) for cell in row.split("|")[2:5]]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_names_of_modules_are_all_there_are(family):
    """Each parameter begins with one of the names, and each name has parameters."""
    config, _ = families.FAMILIES[family](48)
    model = hf.AutoModelForImageTextToText.from_config(config)
    names = [name for cell in modules_of(family) for name in cell] + ["lm_head"]
    found = Counter()
    for parameter, _ in model.named_parameters():
        (owner,) = [name for name in names if parameter.startswith(name)]
        found[owner] += 1
    assert set(found) == set(names)
