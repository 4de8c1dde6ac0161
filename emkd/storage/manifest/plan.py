"""Which rows make which shard: the plan of a cache and of its extensions.

The plan of manifest.json is arithmetic: shard n holds the rows [n * rows_per_shard, (n + 1) * rows_per_shard) of one
dataset. An extension (extensions/<e>/plan.json, e = 1, 2, ...) adds shards after the existing ones, with rows of a
larger version of the first dataset or of another dataset; no committed shard changes. Datasets are numbered in the same
way: 0 is the manifest's dataset, e that of extension e.

Everything here is a pure function of these files.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from emkd.storage.objects.digest import canonical_json, sha256_hex
from emkd.storage.objects.sizes import LARGEST, MOST_SHARDS

Count = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Range = tuple[Count, Count]  # [first, last)


class Stored(BaseModel):
    """Base class for parts of the cache's JSON files: unknown and missing fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def __copy__(self) -> Self:
        """Copy the fields, but not the cached properties: they depend on the fields, which model_copy may change."""
        copied = super().__copy__()
        for name in copied.__dict__.keys() - type(self).model_fields.keys():
            del copied.__dict__[name]
        return copied


class DatasetFile(Stored):
    """One file of a dataset."""

    name: str
    n_rows: Count
    n_bytes: Count


class DatasetIdentity(Stored):
    """A dataset: what its files hold (`fingerprint`), their names and sizes, and the folder of its images."""

    fingerprint: str
    n_rows: Count
    files: tuple[DatasetFile, ...]
    image_root: str | None = None


class ShardPlan(Stored):
    """The plan of manifest.json. n_rows is smaller than the dataset's if the run had a --limit."""

    rows_per_shard: Positive
    n_rows: Count
    n_shards: Count

    @classmethod
    def of(cls, *, n_rows: int, rows_per_shard: int) -> "ShardPlan":
        """Return the plan for `n_rows` rows; the last shard may have fewer than `rows_per_shard`."""
        return cls(rows_per_shard=rows_per_shard, n_rows=n_rows, n_shards=-(-n_rows // rows_per_shard))

    @model_validator(mode="after")
    def _check(self) -> "ShardPlan":
        expected = -(-self.n_rows // self.rows_per_shard)
        if self.n_shards != expected:
            raise ValueError(f"n_shards is {self.n_shards}, expected {expected} for {self.n_rows} rows")
        _check_few_shards(self.n_shards)
        return self

    def rows(self, shard: int) -> range:
        """Return the dataset's rows in a shard. Raises ValueError if the plan does not have the shard."""
        if not 0 <= shard < self.n_shards:
            raise ValueError(f"shard {shard}: the plan has shards 0 to {self.n_shards - 1}")
        return range(shard * self.rows_per_shard, min((shard + 1) * self.rows_per_shard, self.n_rows))


def _check_few_shards(n_shards: int) -> None:
    if n_shards > MOST_SHARDS:
        raise ValueError(f"{n_shards:,} shards; a cache has at most {MOST_SHARDS:,}, use larger ones")


class FoundRows(Stored):
    """Rows of an extension's dataset that the cache already had.

    Rows [row, row + count) of the extension's dataset are rows [source_row, source_row + count) of dataset `source`.
    """

    row: Count
    source: Count
    source_row: Count
    count: Positive


class Extension(Stored):
    """Rows that are added to a cache: extensions/<number>/plan.json, created only if absent.

    number:        of the extension, from 1
    parent_sha256: plan_sha256 of the cache that is extended, so that an extension belongs to one cache only
    n_rows:        this plan covers rows [0, n_rows) of the dataset: those in `rows` and those in `found`
    kept:          ranges of earlier shards that stay in the cache: those that were committed
    first_shard:   the first shard that is added
    rows:          ranges of the dataset's rows that are added, cut into shards of rows_per_shard in this order
    """

    number: Positive
    parent_sha256: str
    dataset: DatasetIdentity
    n_rows: Count
    kept: tuple[Range, ...]
    first_shard: Count
    rows_per_shard: Positive
    rows: tuple[Range, ...]
    found: tuple[FoundRows, ...] = ()
    created_by: dict[str, str] = Field(default_factory=dict)  # package -> version; not hashed

    @model_validator(mode="after")
    def _check(self) -> "Extension":
        n_found = sum(run.count for run in self.found)
        if self.n_added + n_found != self.n_rows:
            raise ValueError(f"{self.n_added} rows are added and {n_found} found, expected {self.n_rows} together")
        if self.n_rows > self.dataset.n_rows:
            raise ValueError(f"n_rows is {self.n_rows}, the dataset has {self.dataset.n_rows}")
        if any(last > self.first_shard for _, last in self.kept):
            raise ValueError(f"kept shards {self.kept} exceed the first new shard, {self.first_shard}")
        for name in ("kept", "rows"):
            flat = [bound for first_and_last in getattr(self, name) for bound in first_and_last]
            if (name == "kept" and flat != sorted(flat)) or any(first > last for first, last in getattr(self, name)):
                raise ValueError(f"{name} are not ranges in order")
        _check_few_shards(self.first_shard + len(self.shards))
        return self

    @cached_property
    def plan_sha256(self) -> str:
        """Hash of all fields except `created_by`; the index of each added shard names it."""
        return sha256_hex(canonical_json(self.model_dump(mode="json", exclude={"created_by"})))

    @property
    def n_added(self) -> int:
        """The number of rows that are added."""
        return self._starts[-1]

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        """The number of rows that are added before each range of `rows`, followed by the number of all of them."""
        return tuple(accumulate((last - first for first, last in self.rows), initial=0))

    @cached_property
    def shards(self) -> range:
        """The shards that are added."""
        return range(self.first_shard, self.first_shard + -(-self.n_added // self.rows_per_shard))

    def n_rows_of(self, shard: int) -> int:
        """Return the number of rows of an added shard. Raises ValueError for any other shard."""
        if shard not in self.shards:
            raise ValueError(f"shard {shard}: extension {self.number} adds shards {self.shards}")
        return min(self.rows_per_shard, self.n_added - (shard - self.first_shard) * self.rows_per_shard)

    def rows_of(self, shard: int) -> list[int]:
        """Return the dataset's rows in an added shard. Raises ValueError for any other shard."""
        if shard not in self.shards:
            raise ValueError(f"shard {shard}: extension {self.number} adds shards {self.shards}")
        start = (shard - self.first_shard) * self.rows_per_shard
        stop = min(start + self.rows_per_shard, self.n_added)
        found: list[int] = []
        i = bisect_right(self._starts, start) - 1
        while start < stop:
            first, last = self.rows[i]
            first += start - self._starts[i]
            found.extend(range(first, min(last, first + stop - start)))
            i, start = i + 1, self._starts[i + 1]
        return found


def as_ranges(numbers: Sequence[int]) -> tuple[Range, ...]:
    """Return ascending numbers as the fewest ranges: [0, 1, 2, 5] -> ((0, 3), (5, 6))."""
    ranges: list[Range] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number:
            ranges[-1] = (ranges[-1][0], number + 1)
        else:
            ranges.append((number, number + 1))
    return tuple(ranges)
