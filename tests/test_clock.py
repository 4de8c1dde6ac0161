"""One date: what a template with `strftime_now` writes, on any day, in any locale."""

import locale
from datetime import datetime

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from emkd.clock import ANY_DAY, clock, clock_of_cache, reads_clock, today, with_clock
from emkd.errors import UsageError

FORMATS = (
    "%Y-%m-%d", "%d %b %Y", "%A, %B %d, %Y", "%a %p %I:%M", "%H:%M:%S", "%-d/%-m/%y", "%j %U %W %u %w %G %V", "%F %T",
    "%D %R %r", "%c", "%x %X", "100%% of %e", "%h %C %g %y %-H %-I %-M %-S %-j %-U %-y %P %k %l %^a %^B %f [%z%Z]",
    "no directive", "",
)  # fmt: skip


def written(template: str, day: str | None) -> str:
    ((text,), _) = render_jinja_template([[]], chat_template=template if day is None else with_clock(template, day))
    return text


@pytest.mark.parametrize(
    "day", ["2026-11-30", "2024-02-29T00:05:09", "2023-01-01T13:59:00", ANY_DAY, "1999-12-31T23:00"]
)
@pytest.mark.parametrize("shape", FORMATS)
def test_a_pinned_date_is_written_as_strftime_writes_it(day, shape):
    template = "{{ '[' + strftime_now('" + shape + "') + ']' }}"
    assert written(template, day) == f"[{datetime.fromisoformat(day).strftime(shape)}]"


def test_the_rest_of_the_template_is_as_it_was():
    """Its first line break, its blanks, its own names, and a date that it computes with."""
    template = (
        "\n  {% set values = strftime_now('%Y') | int - 1 %}\n {{ values }} {% if strftime_now is defined %}yes{% endif %}"
        "{%- macro shown() %}<{{ strftime_now('%Y') }}>{% endmacro %}{{ shown() }}\n"
    )
    assert written(template, datetime.now().isoformat()) == written(template, None)


def test_a_template_without_a_date_is_the_same_object():
    assert with_clock("{{ messages }}", "2026-11-30") == "{{ messages }}"
    assert not reads_clock(None)
    assert not reads_clock("{{ now }}")
    assert reads_clock("{{ strftime_now('%d') }}")


def test_the_locale_changes_no_text(monkeypatch):
    """A program that calls emkd may have set one: `%B` would be "November" here and "novembre" there."""
    before = locale.setlocale(locale.LC_ALL)
    installed = [name for name in ("fr_FR.UTF-8", "de_DE.UTF-8", "C.UTF-8") if _sets(name)]
    for name in installed:
        locale.setlocale(locale.LC_ALL, name)
        try:
            with_clock.cache_clear()
            assert written("{{ strftime_now('%A %d %B %p') }}", "2026-11-30T10:00") == "Monday 30 November AM"
        finally:
            locale.setlocale(locale.LC_ALL, before)


def test_a_directive_that_is_not_known_is_said():
    with pytest.raises(Exception, match="strftime_now: emkd does not know %Q"):
        written("{{ strftime_now('%Q') }}", "2026-11-30")


def test_clocks_have_one_form():
    assert clock("2026-11-30") == clock("2026-11-30T00:00:00") == "2026-11-30"
    assert clock("2026-11-30T10:15:00.5") == "2026-11-30T10:15:00"
    assert clock(today()) == today()
    with pytest.raises(UsageError, match="--clock 'yesterday': expected a date"):
        clock("yesterday")
    with pytest.raises(UsageError, match="no zone"):
        clock("2026-11-30T10:15:00+02:00")


def test_which_clock_a_cache_has():
    dated = "{{ strftime_now('%Y') }}"
    assert clock_of_cache("c", dated, "2026-11-30", None) == "2026-11-30"
    assert clock_of_cache("c", dated, "2026-11-30", "2026-11-30T00:00") == "2026-11-30"
    assert clock_of_cache("c", "no date", None, None) is None
    assert clock_of_cache("c", dated, None, "2026-11-29") == "2026-11-29"
    with pytest.raises(UsageError, match="c was made with the date 2026-11-30; leave --clock out"):
        clock_of_cache("c", dated, "2026-11-30", "2026-11-29")
    with pytest.raises(UsageError, match="c: its chat template writes the date .* Name the day .* --clock"):
        clock_of_cache("c", dated, None, None)


def _sets(name: str) -> bool:
    before = locale.setlocale(locale.LC_ALL)
    try:
        locale.setlocale(locale.LC_ALL, name)
    except locale.Error:
        return False
    locale.setlocale(locale.LC_ALL, before)
    return True
