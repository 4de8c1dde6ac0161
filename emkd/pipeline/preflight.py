"""Before the job: run a few rows through all stages, and estimate size and time of the job from them."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from emkd.errors import JobFailedError
from emkd.pipeline.actors import result_of
from emkd.pipeline.basis_choice import Choice
from emkd.pipeline.cache_size import Sizes
from emkd.pipeline.out_of_memory import OUT_OF_MEMORY
from emkd.pipeline.progress import EXCESS, log
from emkd.pipeline.settings import JobSettings
from emkd.pipeline.skipped import Checked, Forecast, SkipLimit
from emkd.pipeline.worker import Preflight
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.objects.open import open_files
from emkd.units import size_text, time_text
from emkd.vlm.codes import NOT_FINITE, OUT_OF_RANGE

PREFLIGHT_ROWS = 32
READ_ROWS = 128  # of which all are read: most rows that cannot be used are found without the teacher
STUDIED = 8  # of these, and at most a quarter of them, on which other settings are measured
# Why rows are skipped that were read without fault.
TEACHERS_REASONS = (NOT_FINITE, OUT_OF_MEMORY, OUT_OF_RANGE)
UNRELATED = 3  # times the predicted error


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What the job will cost, estimated from the preflight's rows. Sizes include all files, indexes and seal too.

    codes: the basis that was chosen, in words; empty if the cache has one already, or no codes
    vision_tokens, logits_and_codes: of the whole job, and the bytes of one of them for logits, tails and codes
    basis_bytes: of the basis that was chosen, once
    study: what was found about other settings, None if nothing was asked for
    forecast: of rows that cannot be used
    """

    n_rows: int
    n_shards: int
    sizes: Sizes
    bytes_per_vision_token: float
    seconds: float
    free_bytes: int
    codes: str = ""
    vision_tokens: float = 0.0
    logits_and_codes: float = 0.0
    basis_bytes: int = 0
    study: Any = None
    forecast: Forecast | None = None

    @property
    def n_bytes(self) -> int:
        return self.bytes_of(self.n_shards) + self.sizes.once

    def bytes_of(self, n_shards: int) -> int:
        """Bytes of some of the shards."""
        rows = self.n_rows * n_shards / self.n_shards
        return round(rows * self.sizes.per_row + n_shards * self.sizes.per_shard)

    def check_space(self, cache: str) -> None:
        """Raise JobFailedError if the disk is too small."""
        if self.n_bytes > self.free_bytes:
            raise JobFailedError(
                f"{cache}: the job needs about {size_text(self.n_bytes)} and {size_text(self.free_bytes)} are free; "
                "make room, or store less (--affinity codes, fewer --token-bytes; without codes a smaller --top-k)"
            )

    def check_skipped(self) -> None:
        """Raise JobFailedError if more rows will be skipped than --max-skipped allows."""
        if self.forecast is not None:
            self.forecast.check()

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return {
            "rows": self.n_rows,
            "shards": self.n_shards,
            "bytes": self.n_bytes,
            "bytes_per_vision_token": self.bytes_per_vision_token,
            "seconds": self.seconds,
            "free_bytes": self.free_bytes,
            "codes": self.codes or None,
            "skipped": None if self.forecast is None else self.forecast.as_dict(),
        }

    def describe(self) -> str:
        """Return size and time, with what was chosen and what was found, in lines."""
        unusable = None if self.forecast is None else self.forecast.describe()
        return "".join(f"{line}\n" for line in (self.codes, unusable) if line) + (
            f"{self.n_rows:,} rows in {self.n_shards:,} shards: about {size_text(self.n_bytes)} "
            f"({self.bytes_per_vision_token:.0f} bytes per vision token, all files included) and "
            f"{time_text(self.seconds)}; {size_text(self.free_bytes)} free"
        )


def choose_basis(worker: Any, manifest: Manifest, shards: Sequence[int]) -> Choice | None:
    """Make the basis of a new cache from a few rows, evenly spread; None if it has no codes, or a basis already."""
    if manifest.codes is None or manifest.basis is not None:
        return None
    choice: Choice = result_of(worker.choose_basis.remote(spread(manifest, shards)[1]))
    return choice


def study(worker: Any, measure: Any, manifest: Manifest, shards: Sequence[int]) -> Any:
    """Return what `measure` finds about other settings (see `CaptureWorker.study`), on a few rows of the job."""
    rows = spread(manifest, shards)[1]
    n = max(1, min(STUDIED, len(rows) // 4))
    measured = [rows[(2 * i + 1) * len(rows) // (2 * n)] for i in range(n)]
    fitted = [row for row in rows if row not in measured] or rows
    return result_of(worker.study.remote(measure, fitted, measured))


def preflight(
    worker: Any,
    settings: JobSettings,
    manifest: Manifest,
    shards: Sequence[int],
    choice: Choice | None = None,
    *,
    fresh: bool = True,
    limit: SkipLimit | None = None,
) -> Estimate:
    """Run a few rows, evenly spread, through the whole job, so that errors appear here rather than hours later.

    choice: the basis of a cache that does not exist yet
    fresh: nothing is committed yet; then it is an error if none of the rows can be used. In a resumed job, the other
    rows may be usable, and --max-skipped decides
    limit: the rows that are skipped already; none by default
    """
    n_rows, chosen = spread(manifest, shards)
    others = sorted(set(spread(manifest, shards, READ_ROWS)[1]) - set(chosen))
    seen: Preflight = result_of(worker.preflight.remote(chosen, choice, others))
    if fresh and len(seen.skipped) == seen.n_rows:
        first = seen.skipped[0]
        raise JobFailedError(
            f"none of the {seen.n_rows} rows checked can be used; the first is row {first.row}: {first.reason}: "
            f"{first.detail}"
        )
    if not seen.end_token:
        log("the chat template writes no end token after answers: students will not learn where to stop")
    _check_error(seen)
    n_bytes = n_rows * seen.sizes.per_row + len(shards) * seen.sizes.per_shard
    vision_tokens = seen.vision_tokens / seen.n_rows * n_rows
    return Estimate(
        n_rows=n_rows,
        n_shards=len(shards),
        sizes=seen.sizes,
        bytes_per_vision_token=n_bytes / max(1.0, vision_tokens),
        seconds=seen.seconds * n_rows / seen.n_rows / min(settings.workers, len(shards)),
        free_bytes=open_files(settings.cache).free_bytes(),
        codes="" if choice is None else choice.describe(),
        vision_tokens=vision_tokens,
        logits_and_codes=0.0 if choice is None else choice.top_bytes + choice.code_bytes,
        basis_bytes=0 if choice is None else choice.basis.n_bytes,
        forecast=_forecast(
            limit or SkipLimit.of(settings.max_skipped, manifest), manifest, shards, seen, len(chosen) + len(others)
        ),
    )


def _forecast(limit: SkipLimit, manifest: Manifest, shards: Sequence[int], seen: Preflight, n_read: int) -> Forecast:
    """Return what the checked rows say of the dataset that the shards are of."""
    sources = {manifest.source(shard) for shard in shards}
    by_teacher = tuple(row for row in seen.skipped if row.reason in TEACHERS_REASONS)
    unread = (*(row for row in seen.skipped if row.reason not in TEACHERS_REASONS), *seen.unread)
    return Forecast(
        n_rows=sum(limit.n_rows[source] for source in sources),
        n_left=sum(len(manifest.rows(shard)) for shard in shards),
        max_skipped=limit.max_skipped,
        checked=(Checked(n_rows=n_read, skipped=unread), Checked(n_rows=seen.n_rows, skipped=by_teacher)),
        known=sum(limit.skipped[source].n for source in sources),
    )


def _check_error(seen: Preflight) -> None:
    """Compare the error of logits read from codes with the prediction, before the basis is frozen.

    Raises JobFailedError if the two have little to do with each other.
    """
    if seen.logit_error is None or seen.predicted is None:
        return
    measured = seen.logit_error.root
    said = f"logits read from codes have an error of {measured:.3g} on the rows checked, predicted {seen.predicted:.3g}"
    if measured > UNRELATED * seen.predicted:
        raise JobFailedError(
            f"{said}: the weight of this teacher's LM head is not what its logits are made of (quantised?), or its "
            "rows have little in common; use --logit-error none"
        )
    log(said if measured <= EXCESS * seen.predicted else f"warning: {said}")


def spread(manifest: Manifest, shards: Sequence[int], n: int = PREFLIGHT_ROWS) -> tuple[int, list[int]]:
    """Return (number of rows of the shards, at most n of these rows, evenly spread).

    A list of all rows would be the largest object in the driver of a large job.
    """
    starts = list(accumulate((len(manifest.rows(shard)) for shard in shards), initial=0))
    n_chosen = min(n, starts[-1])
    chosen = [starts[-1] * i // n_chosen for i in range(n_chosen)]  # indices into the rows of all shards
    holding = [bisect_right(starts, index) - 1 for index in chosen]
    rows = [manifest.rows(shards[at])[index - starts[at]] for at, index in zip(holding, chosen, strict=True)]
    return starts[-1], rows
