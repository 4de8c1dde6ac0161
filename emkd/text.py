"""Text from data, models and caches, made fit for a terminal and for a table of one line a row."""

import unicodedata
from collections.abc import Callable

MAX_DETAIL = 500

# Cc: control (colours of a terminal, line ends); Cf: format (bidirectional overrides, invisible marks); Cs: surrogates,
# which UTF-8 cannot store; Co, Cn: private and unassigned; Zl, Zp: line and paragraph separators. They can move a
# cursor, hide text, or show it in another order.
_UNFIT = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def printable(text: str) -> str:
    """Return the text on one line, with a dot in place of each character that is unfit for a terminal."""
    return _replaced(text, lambda _: "·")


def printable_lines(text: str) -> str:
    """As `printable`, but line ends stay."""
    return "\n".join(map(printable, text.split("\n")))


def one_line(text: str, limit: int = MAX_DETAIL) -> str:
    """Return the text on one line of at most `limit` characters.

    White space of any kind becomes one space; characters that are unfit for a terminal are escaped, as Python writes
    them.
    """
    cut = text[: 2 * limit]
    joined = " ".join(cut.split()) if any(c.isspace() and c != " " for c in cut) else cut
    shown = _replaced(joined, lambda c: c.encode("unicode_escape").decode())
    return shown if len(shown) <= limit and len(cut) == len(text) else shown[: limit - 1] + "…"


def _replaced(text: str, replacement: Callable[[str], str]) -> str:
    return "".join(replacement(c) if unicodedata.category(c) in _UNFIT else c for c in text)
