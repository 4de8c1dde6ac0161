"""Text from data, models and caches, made safe to show on a terminal."""

import re

# Of the Unicode categories Cc, Cf, Cs, Zl and Zp: control, format (which includes the bidirectional) and surrogate
# characters, line and paragraph separators. They can move a cursor, hide text, or show it in another order.
_UNSAFE = (
    "\x00-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b-\u200f\u2028-\u202e"
    "\u2060-\u2064\u2066-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0001\U000e0020-\U000e007f"
)
_ON_ONE_LINE = re.compile(f"[{_UNSAFE}]")
_ON_LINES = re.compile(f"(?!\n)[{_UNSAFE}]")


def printable(text: str) -> str:
    """Return the text on one line, with each control, format and bidirectional character replaced by a dot."""
    return _ON_ONE_LINE.sub("·", text)


def printable_lines(text: str) -> str:
    """As `printable`, but line ends stay."""
    return _ON_LINES.sub("·", text)
