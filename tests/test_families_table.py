"""The table says yes only where tests were there and passed."""

import re

from tests import families, families_table

EXACT = families_table.EXACT


def test_a_test_that_failed_or_is_missing_is_a_no():
    outcomes = {f"{EXACT}[llava-1]": True, f"{EXACT}[llava-2]": True, "test_each_tile_is_averaged[llava]": False}
    rows = families_table.table(outcomes).splitlines()
    assert "| `llava` | yes | no | no | no |" in rows
    assert "| `gemma3` | no | no | no | no |" in rows
    assert "| `llava_next` | no | no | no | no |" in rows


def test_the_page_has_every_family_and_column():
    page = families_table.PAGE.read_text()
    assert re.findall(r"^\| `(\w+)`(?: \| (?:yes|no)){4} \|$", page, re.MULTILINE) == list(families.FAMILIES)
    assert "| family | " + " | ".join(families_table.COLUMNS) + " |" in page
