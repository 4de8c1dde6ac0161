"""What is shown has no character that controls a terminal or changes the order of what is read."""

import sys
import unicodedata

from emkd.text import printable, printable_lines

UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def test_every_character_of_unicode():
    """Against the categories that Python's own table has."""
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        category = unicodedata.category(character)
        if category in UNSAFE:
            assert printable(character) == "·", hex(code)
        else:
            assert printable(character) == character, hex(code)


def test_lines_stay_lines():
    assert printable_lines("a\nb\r\tc\u202ed\x1b[31m") == "a\nb··c·d·[31m"
    assert printable("a\nb") == "a·b"
