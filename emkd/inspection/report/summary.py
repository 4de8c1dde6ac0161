"""The whole cache in numbers, from manifest, index and seal alone; no shard is read."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from emkd.storage.cache import Cache
from emkd.storage.index.columns import as_numpy, text_scalar
from emkd.storage.manifest.plan import Extension
from emkd.storage.objects.names import basis_name

PERCENTILES = (1, 10, 50, 90, 99)
DENSE_BYTES = 2  # of a bfloat16 logit


def summarize(cache: Cache) -> dict[str, Any]:
    """Return teacher, data, counts, bytes by part, ratio to dense logits and retained mass as plain values.

    A cache that is not sealed is reported as it is committed now: `shards` and `rows` say how much of the plan that is.
    `dataset` is the data that the cache was started with, `extensions` what was added later and how many rows each
    added. `skipped` is {reason: count}, `skipped_examples` the first such row as {reason: {row, id, key, detail}}.
    """
    manifest, totals = cache.manifest, cache.totals
    rows = cache.rows.skipped(("row", "id", "key", "detail", "reason"))
    n_bytes = sum(totals.n_bytes.values())
    return {
        "sealed": cache.sealed,
        "format_version": manifest.format_version,
        "teacher": manifest.teacher.model_dump(),
        "image_processor": manifest.image_processor.class_name,
        "vocabulary": manifest.vocabulary_size,
        "stored": {
            "top_k": manifest.top_k,
            "answer_top_k": manifest.answer_top_k,
            "logits": manifest.logits_precision,
            "affinity": manifest.affinity_precision if manifest.stores_affinity else "codes",
            "compression": manifest.compression or "zstd",
        },
        "codes": _codes(cache),
        "logit_error": _logit_error(cache),
        "dataset": {
            "files": [file.name for file in manifest.dataset.files],
            "rows": manifest.dataset.n_rows,
            "cached_rows": manifest.plan.n_rows,
            "fingerprint": manifest.dataset.fingerprint,
        },
        "extensions": [_extension(extension) for extension in manifest.extensions],
        "samples": cache.n_samples,
        "skipped": (skipped := _skipped(rows)),
        "skipped_examples": {reason: _example(rows, reason) for reason in skipped},
        "shards": {"committed": len(cache.shards), "planned": len(manifest.shards)},
        "rows": {"committed": len(cache.rows), "planned": manifest.n_rows},
        "tokens": {
            "vision": totals.vision_tokens,
            "text": totals.text_tokens,
            "answer": totals.answer_tokens,
        },
        "shared_vision_tokens": totals.vision_tokens - (totals.stored_vision_tokens or totals.vision_tokens),
        "bytes": {**totals.n_bytes, "total": n_bytes},
        "bytes_per_vision_token": _per_vision_token(totals.n_bytes, totals.vision_tokens),
        "dense_ratio": _dense_ratio(cache, totals.n_bytes),
        "retained_mass": _retained_mass(cache),
    }


def _codes(cache: Cache) -> dict[str, Any] | None:
    """What is known of the codes' basis, None without codes. bytes: of its object, once for the cache"""
    basis, asked = cache.manifest.basis, cache.manifest.codes
    if basis is None or asked is None:
        return None
    name = basis_name(basis.sha256)
    sealed = None if cache.seal is None else cache.seal.objects[name].n_bytes
    return {
        "asked": asked.model_dump(),
        "columns": basis.n_columns,
        "width": basis.width,
        "step": basis.step,
        "bytes": len(cache.files.read(name) or b"") if sealed is None else sealed,
    }


def _logit_error(cache: Cache) -> dict[str, float | None] | None:
    """Root mean square error of logits read from codes, as predicted by the preflight and as measured by the job."""
    basis = cache.manifest.basis
    return None if basis is None else {"predicted": basis.logit_error, "measured": cache.totals.logit_error}


def _extension(extension: Extension) -> dict[str, Any]:
    return {
        "files": [file.name for file in extension.dataset.files],
        "rows": extension.dataset.n_rows,
        "added_rows": extension.n_added,
        "fingerprint": extension.dataset.fingerprint,
    }


def _skipped(skipped: pa.Table) -> dict[str, int]:
    counted = pc.value_counts(skipped["reason"]).to_pylist()
    return {entry["values"]: entry["counts"] for entry in sorted(counted, key=lambda e: -e["counts"])}


def _example(skipped: pa.Table, reason: str) -> dict[str, Any]:
    """The first row, in the order of the data, that was skipped for this reason."""
    first = pc.index(skipped["reason"], text_scalar(reason)).as_py()
    row: dict[str, Any] = skipped.drop_columns(["reason"]).slice(first, 1).to_pylist()[0]
    return row


def _per_vision_token(n_bytes: dict[str, int], vision_tokens: int) -> dict[str, float | None]:
    parts = {**n_bytes, "total": sum(n_bytes.values())}
    return {name: value / vision_tokens if vision_tokens else None for name, value in parts.items()}


def _dense_ratio(cache: Cache, n_bytes: dict[str, int]) -> float | None:
    """How many times larger all V logits of vision and answer tokens would be, as raw bfloat16."""
    totals = cache.totals
    dense = (totals.vision_tokens + totals.answer_tokens) * cache.manifest.vocabulary_size * DENSE_BYTES
    stored = sum(value for name, value in n_bytes.items() if name.startswith(("vision_", "answer_")))
    return dense / stored if stored else None


def _retained_mass(cache: Cache) -> dict[str, float] | None:
    """Percentiles, over samples, of the mean probability that the stored logits of a vision token hold together."""
    masses = as_numpy(cache.sample_column("retained_mass").drop_null())
    if len(masses) == 0:
        return None
    values = np.percentile(masses, PERCENTILES)
    return {f"p{p}": float(value) for p, value in zip(PERCENTILES, values, strict=True)}
