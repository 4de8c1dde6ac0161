"""The date that a chat template writes: asked for once, pinned, and the same on both sides and on every day.

Some templates write today's date (`strftime_now`; public Mistral 3 and Llama 3 templates do). The text of a row would
then depend on the day: a cache made today would not fit a training run of tomorrow. So a job asks for the date once
(`today`), the manifest keeps it, and whoever renders text for that cache puts it into the template (`with_clock`).

A clock is a date or a date with a time, local and without a zone: "2026-11-30", "2026-11-30T10:15:00". No other module
of emkd asks the machine for a date.
"""

import json
from datetime import datetime
from functools import lru_cache

from emkd.errors import UsageError

# For questions about a template whose answer does not depend on the date, such as what it writes for an image.
ANY_DAY = "2000-01-01"

_NAME = "strftime_now"
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
_NUMBERS = "CdGgHIjmMSuUVwWyYzZ"  # of these, strftime's result depends on no locale

# `strftime_now` as a macro over a table of directives. It ends in a newline, which Jinja drops after a block.
_MACRO = """\
{%%- macro strftime_now(format) -%%}
{%%- set values = %s -%%}
{%%- set found = namespace(directive='') -%%}
{%%- for letter in format -%%}
{%%- if found.directive -%%}
{%%- set found.directive = found.directive + letter -%%}
{%%- if letter not in '-_0^#' -%%}
{%%- if found.directive not in values -%%}
{{- raise_exception('strftime_now: emkd does not know ' + found.directive) -}}
{%%- endif -%%}
{{- values[found.directive] -}}
{%%- set found.directive = '' -%%}
{%%- endif -%%}
{%%- elif letter == '%%' -%%}
{%%- set found.directive = letter -%%}
{%%- else -%%}
{{- letter -}}
{%%- endif -%%}
{%%- endfor -%%}
{%%- endmacro %%}
"""


def today() -> str:
    """Return today's date as a clock: the only place where emkd asks for it."""
    return datetime.now().date().isoformat()


def clock(text: str) -> str:
    """Return a clock in the form that manifests keep: without a time if that is midnight. Raises UsageError."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(
            f"--clock {text!r}: expected a date or a local time, such as {ANY_DAY} or {ANY_DAY}T10:15:00"
        ) from None
    if moment.tzinfo is not None:
        raise UsageError(f"--clock {text!r}: a local time has no zone; leave it out")
    whole = moment.replace(microsecond=0)
    return whole.isoformat().removesuffix("T00:00:00")


def reads_clock(template: str | None) -> bool:
    """Return whether a chat template may write the date."""
    return template is not None and _NAME in template


@lru_cache(maxsize=16)
def with_clock(template: str, pinned: str) -> str:
    """Return a template that writes the same as `template` at the moment `pinned`, at any time and in any locale."""
    if not reads_clock(template):
        return template
    return _MACRO % json.dumps(_directives(datetime.fromisoformat(pinned))) + template


def clock_of_cache(where: str, template: str | None, pinned: str | None, named: str | None) -> str | None:
    """Return the clock with which rows of a cache are read; None if its template writes no date.

    where: names the cache in messages;  pinned: the clock of its manifest;  named: what the user gave as --clock

    Raises UsageError if the two differ, or if there is neither and the template needs one.
    """
    if pinned is not None:
        if named is not None and clock(named) != pinned:
            raise UsageError(f"--clock {named}: {where} was made with the date {pinned}; leave --clock out")
        return pinned
    if not reads_clock(template):
        return None
    if named is None:
        raise UsageError(
            f"{where}: its chat template writes the date (strftime_now), and it was made before emkd kept the date, so "
            "the text of its rows is not known. Name the day on which it was made with --clock YYYY-MM-DD: each row is "
            "compared with it. If the job ran over midnight, make the cache again"
        )
    return clock(named)


def _directives(moment: datetime) -> dict[str, str]:
    """Return what each directive of strftime gives in the C locale: with other names, other text would be learnt."""
    values = {f"%{letter}": moment.strftime(f"%{letter}") for letter in _NUMBERS}
    values |= {f"%-{letter}": str(int(values[f"%{letter}"])) for letter in "dgHIjmMSUVWy"}
    day, month = _DAYS[moment.weekday()], _MONTHS[moment.month - 1]
    values |= {
        "%A": day, "%a": day[:3], "%B": month, "%b": month[:3], "%h": month[:3],
        "%p": "AM" if moment.hour < 12 else "PM", "%P": "am" if moment.hour < 12 else "pm",
        "%e": f"{moment.day:2}", "%k": f"{moment.hour:2}", "%l": f"{(moment.hour + 11) % 12 + 1:2}",
        "%f": f"{moment.microsecond:06}", "%%": "%", "%n": "\n", "%t": "\t",
        "%^a": day[:3].upper(), "%^A": day.upper(), "%^b": month[:3].upper(), "%^B": month.upper(),
    }  # fmt: skip
    whole = {
        "%F": "%Y-%m-%d", "%D": "%m/%d/%y", "%x": "%m/%d/%y", "%T": "%H:%M:%S", "%X": "%H:%M:%S", "%R": "%H:%M",
        "%r": "%I:%M:%S %p", "%c": "%a %b %e %H:%M:%S %Y",
    }  # fmt: skip
    return values | {name: _filled(text, values) for name, text in whole.items()}


def _filled(text: str, values: dict[str, str]) -> str:
    for name in [text[n : n + 2] for n, letter in enumerate(text) if letter == "%"]:
        text = text.replace(name, values[name])
    return text
