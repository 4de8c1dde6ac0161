"""Rows that cannot be used, against the share that --max-skipped allows: before the job, during it, and at its end.

A share is of each dataset of a cache, not of all together. A job fails for certain as soon as more rows are skipped
than the share of all rows of the dataset, even if every other row can be used.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import comb, floor

from emkd.errors import JobFailedError
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.record import CapturedRow

# A job whose share of unusable rows is just allowed fails at its preflight by mere chance this often.
BY_CHANCE = 0.001


@dataclass(frozen=True, kw_only=True)
class SkippedRow:
    """A row that is not used, and why."""

    row: int
    id: str
    reason: str
    detail: str

    @property
    def line(self) -> str:
        """The row in one line."""
        return f"row {self.row} (id {self.id!r}): {self.detail}"


@dataclass(kw_only=True)
class Skipped:
    """What is known of the skipped rows of one dataset: as much for a million of them as for one."""

    reasons: Counter[str] = field(default_factory=Counter)
    first: SkippedRow | None = None

    @classmethod
    def of(cls, rows: Iterable[SkippedRow]) -> "Skipped":
        """Count some rows."""
        found = cls()
        for row in rows:
            found.add(Skipped(reasons=Counter({row.reason: 1}), first=row))
        return found

    @property
    def n(self) -> int:
        """The number of skipped rows."""
        return self.reasons.total()

    def add(self, other: "Skipped") -> None:
        """Count further rows."""
        self.reasons.update(other.reasons)
        rows = [found for found in (self.first, other.first) if found is not None]
        self.first = min(rows, key=lambda row: row.row, default=None)

    def described(self, times: float = 1.0) -> str:
        """Reasons with their numbers: "3 image-broken, 1 no-answer". times: each number is multiplied by it"""
        return ", ".join(f"{max(1, round(n * times)):,} {reason}" for reason, n in self.reasons.most_common())


class SkipLimit:
    """Counts the skipped rows of all datasets of a cache.

    n_rows: of each dataset, all that the cache is to have, by the dataset's index in `manifest.datasets`
    """

    def __init__(self, max_skipped: float, n_rows: Mapping[int, int]) -> None:
        self.max_skipped, self.n_rows = max_skipped, n_rows
        self.skipped = {source: Skipped() for source in n_rows}

    @classmethod
    def of(cls, max_skipped: float, manifest: Manifest, shards: Iterable[int] | None = None) -> "SkipLimit":
        """Return the limit of a cache that has skipped nothing yet. shards: those that count; all by default"""
        n_rows: Counter[int] = Counter()
        for shard in manifest.shards if shards is None else shards:
            n_rows[manifest.source(shard)] += len(manifest.rows(shard))
        return cls(max_skipped, dict(sorted(n_rows.items())))

    def add(self, source: int, skipped: Skipped) -> None:
        """Count skipped rows of a dataset."""
        self.skipped[source].add(skipped)

    @property
    def passed(self) -> int | None:
        """The first dataset of which too many rows are skipped, whatever becomes of the rest; None if there is none."""
        return next(
            (source for source, n in self.n_rows.items() if self.skipped[source].n > self.max_skipped * n), None
        )

    def check(self, more: str = "") -> None:
        """Raise JobFailedError if too many rows of a dataset are skipped: the call or the data are wrong.

        more: what else to say at the end
        """
        source = self.passed
        if source is None:
            return
        found, n_rows = self.skipped[source], self.n_rows[source]
        first = "" if found.first is None else f"; the first is {found.first.line}"
        raise JobFailedError(
            f"{found.n} of {n_rows} rows were skipped ({found.described()}), more than --max-skipped "
            f"{self.max_skipped}{first}. Fix the data, or accept them with a larger --max-skipped: then nothing is "
            f"computed again{more}"
        )


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Some rows that were tried before the job.

    n_rows:  how many, evenly spread;  skipped: those among them that cannot be used
    """

    n_rows: int
    skipped: Sequence[SkippedRow] = ()


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a few rows say of the rows of one dataset that the job will skip.

    n_rows:      of the dataset;  n_left: those that are not committed, from which the rows are
    known:       rows that are skipped already
    checked:     several lots of rows: a row that a later lot skips was read without fault
    """

    n_rows: int
    n_left: int
    max_skipped: float
    checked: Sequence[Checked]
    known: int = 0

    @property
    def found(self) -> Skipped:
        """All rows that were tried and cannot be used."""
        return Skipped.of(row for lot in self.checked for row in lot.skipped)

    @property
    def expected(self) -> float:
        """The rows of the dataset that will be skipped, if the rest is like the rows that were tried."""
        return self.known + sum(len(lot.skipped) / lot.n_rows * self.n_left for lot in self.checked if lot.n_rows)

    @property
    def certain(self) -> bool:
        """Whether the job will fail even if every row that was not tried can be used."""
        return self.known + self.found.n > self.max_skipped * self.n_rows

    @property
    def fails(self) -> bool:
        """Whether the job will fail: for certain, or but for a chance of BY_CHANCE."""
        if self.certain:
            return True
        share = max(0.0, self.max_skipped * self.n_rows - self.known) / self.n_left if self.n_left else 1.0
        return any(at_least(len(lot.skipped), lot.n_rows, min(1.0, share)) < BY_CHANCE for lot in self.checked)

    def describe(self) -> str | None:
        """Return what to say of unusable rows, None if there were none."""
        found = self.found
        if found.first is None:
            return None
        tried = max(lot.n_rows for lot in self.checked)
        whole = tried >= self.n_left
        times = self.n_left / tried
        share = f"{100 * self.expected / self.n_rows:.2g} %"
        if whole:
            rows = f"{round(self.expected):,} of {self.n_rows:,} rows ({share}: {found.described()})"
        else:
            rows = (
                f"about {round(self.expected):,} of {self.n_rows:,} rows ({share}: about {found.described(times)}), by "
                f"{found.n} of the {tried} rows checked"
            )
        before = f" ({self.known} of them are skipped already)" if self.known else ""
        return f"{rows} cannot be used{before}; the first is {found.first.line}"

    def as_dict(self) -> dict[str, object]:
        """Return the figures as plain values."""
        return {
            "rows_checked": max(lot.n_rows for lot in self.checked),
            "unusable": self.found.n,
            "reasons": dict(self.found.reasons.most_common()),
            "expected": round(self.expected),
            "share": self.expected / self.n_rows,
        }

    def check(self) -> None:
        """Raise JobFailedError if the job would fail for its skipped rows."""
        if self.fails:
            allowed = floor(self.max_skipped * self.n_rows)
            raise JobFailedError(
                f"{self.describe()}. --max-skipped {self.max_skipped} allows {allowed:,}, so the job would fail. Fix "
                "the data, or accept these rows with a larger --max-skipped"
            )


def at_least(k: int, n: int, share: float) -> float:
    """Return the probability that k or more of n rows cannot be used, if a share of all rows cannot."""
    return sum(comb(n, i) * share**i * (1 - share) ** (n - i) for i in range(k, n + 1))


def skipped_among(rows: Iterable[CapturedRow]) -> tuple[SkippedRow, ...]:
    """Return those of some captured rows that have no record."""
    return tuple(
        SkippedRow(row=row.hint.row, id=row.hint.id, reason=row.reason, detail=row.detail)
        for row in rows
        if row.record is None
    )
