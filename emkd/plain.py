"""Foreign text, made fit for a terminal and for a table of one line a row."""

import unicodedata

MAX_DETAIL = 500

# Cc: control (colours of a terminal, line ends); Cf: format (bidirectional overrides, invisible marks); Cs: surrogates,
# which UTF-8 cannot store; Co, Cn: private and unassigned; Zl, Zp: line and paragraph separators.
_UNFIT = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def one_line(text: str, limit: int = MAX_DETAIL) -> str:
    """Return the text on one line of at most `limit` characters, without control, bidirectional or format characters.

    White space of any kind becomes one space; other unfit characters are escaped, as Python writes them.
    """
    cut = text[: 2 * limit]
    joined = " ".join(cut.split()) if any(c.isspace() and c != " " for c in cut) else cut
    shown = "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in _UNFIT else c for c in joined)
    return shown if len(shown) <= limit and len(cut) == len(text) else shown[: limit - 1] + "…"
