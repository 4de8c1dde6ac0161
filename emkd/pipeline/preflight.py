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
from emkd.pipeline.progress import EXCESS, log
from emkd.pipeline.settings import JobSettings
from emkd.pipeline.worker import Preflight
from emkd.storage.manifest.manifest import Manifest
from emkd.storage.objects.open import open_files
from emkd.units import size_text, time_text

PREFLIGHT_ROWS = 32
STUDIED = 8  # of these, and at most a quarter of them, on which other settings are measured
UNRELATED = 3  # times the predicted error


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What the job will cost, estimated from the preflight's rows. Sizes include all files, indexes and seal too.

    codes: the basis that was chosen, in words; empty if the cache has one already, or no codes
    vision_tokens, logits_and_codes: of the whole job, and the bytes of one of them for logits, tails and codes
    basis_bytes: of the basis that was chosen, once
    study: what was found about other settings, None if nothing was asked for
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
        }

    def describe(self) -> str:
        return (f"{self.codes}\n" if self.codes else "") + (
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
) -> Estimate:
    """Run a few rows, evenly spread, through the whole job, so that errors appear here rather than hours later.

    choice: the basis of a cache that does not exist yet
    fresh: nothing is committed yet; then it is an error if none of the rows can be used. In a resumed job, the other
    rows may be usable, and --max-skipped decides at the end
    """
    n_rows, chosen = spread(manifest, shards)
    seen: Preflight = result_of(worker.preflight.remote(chosen, choice))
    if fresh and len(seen.skipped) == seen.n_rows:
        raise JobFailedError(f"none of the {seen.n_rows} rows checked can be used; the first is {seen.skipped[0]}")
    if not seen.end_token:
        log("the chat template writes no end token after answers: students will not learn where to stop")
    _check_error(seen)
    for line in seen.skipped:
        log(f"preflight would skip {line}")
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


def spread(manifest: Manifest, shards: Sequence[int]) -> tuple[int, list[int]]:
    """Return (number of rows of the shards, a few of these rows, evenly spread).

    A list of all rows would be the largest object in the driver of a large job.
    """
    starts = list(accumulate((len(manifest.rows(shard)) for shard in shards), initial=0))
    n_chosen = min(PREFLIGHT_ROWS, starts[-1])
    chosen = [starts[-1] * i // n_chosen for i in range(n_chosen)]  # indices into the rows of all shards
    holding = [bisect_right(starts, index) - 1 for index in chosen]
    rows = [manifest.rows(shards[n])[index - starts[n]] for n, index in zip(holding, chosen, strict=True)]
    return starts[-1], rows
