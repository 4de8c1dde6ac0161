"""How large a cache is, and what a lossy precision costs: bytes of shards by k and precision, and the KL.

    python -m benchmarks.storage.cache_bytes [--pool build/pool-128.npz]

Samples of 2,916 vision tokens (4 tiles of common/synthetic_records.py, each tile once) and 200 text tokens, written by
a `ShardWriter` and read back. Every object of a shard counts, tails, affinity and answers included. The KL is KL(p ‖ q)
from the teacher's distribution p over the stored ids to the distribution q that is read back, both normalised over the
k ids, mean over vision tokens; 0 if nothing is lost.
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common.manifests import TOKENIZER, synthetic_manifest
from benchmarks.common.synthetic_records import POOL, Pool, V, sample_rows, tile_pool
from emkd.storage import Cache, CapturedRow, commit_shard, create_cache
from emkd.storage.lifecycle.seal import seal
from emkd.storage.record import TopLogits
from emkd.storage.shards.writer import ShardWriter

K = 128
TILES = (4,)
LOSSLESS, LOSSY = ("bfloat16",), ("step0.1", "step0.2")
LEVELS = tuple((k, precision) for k in (50, 64, 128) for precision in LOSSLESS + LOSSY)


def cut(row: CapturedRow, k: int) -> CapturedRow:
    """Return the row with k logits of each token; the rest of the logits moves to the tail's logsumexp."""
    record = row.record
    assert record is not None
    return replace(row, record=replace(record, vision=_smaller(record.vision, k), answer=_smaller(record.answer, k)))


def _smaller(top: TopLogits, k: int) -> TopLogits:
    dropped = top.logits[:, k:].astype(np.float64)
    more = np.logaddexp.reduce(dropped, axis=1) if dropped.shape[1] else np.full(len(top), -np.inf)
    tail = np.logaddexp(more, top.tail_logsumexp).astype(np.float32)
    found = replace(top, ids=top.ids[:, :k], logits=top.logits[:, :k], tail_logsumexp=tail)
    return found.map(np.ascontiguousarray)


def rows_of(pool: Pool, k: int) -> Iterator[CapturedRow]:
    n = POOL // TILES[0]
    for row in sample_rows(pool, n, n, tiles=TILES):
        yield cut(row, k)


def figures(pool: Pool, k: int, precision: str) -> dict[str, float]:
    """Return bytes by part for one vision token, bytes of an affinity entry, and the KL."""
    n = POOL // TILES[0]
    settings = synthetic_manifest(n, n, top_k=k, vocabulary=V, compression="zstd", logits_precision=precision)
    with tempfile.TemporaryDirectory(prefix="emkd-bytes-") as folder:
        files = create_cache(folder, settings, TOKENIZER)
        writer = ShardWriter(files, 0, "a", settings)
        for row in rows_of(pool, k):
            writer.add(row)
        commit_shard(files, writer.finish())
        seal(files)
        cache = Cache.open(folder)
        losses = [divergence(row, cache, i) for i, row in enumerate(rows_of(pool, k))]
        totals = cache.totals
        on_disk = sum(files.sizes().values()) - len(files.read("manifest.json") or b"") - len(TOKENIZER)
    parts = {name: size / totals.vision_tokens for name, size in totals.n_bytes.items()}
    return {
        "ids_and_logits": sum(size for name, size in parts.items() if name.startswith(("vision_ids", "vision_logits"))),
        "tails": parts["vision_tail_logsumexp"] + parts["vision_tail_mean"],
        "affinity": parts["affinity"],
        "whole_record": sum(parts.values()),
        "all_files": on_disk / totals.vision_tokens,
        "affinity_per_entry": totals.n_bytes["affinity"] / (totals.vision_tokens * totals.text_tokens / n),
        "kl": float(np.mean([loss["kl"] for loss in losses])),
        "largest_affinity_error": max(loss["affinity"] for loss in losses),
    }


def divergence(row: CapturedRow, cache: Cache, number: int) -> dict[str, float]:
    """Return the KL over the stored logits and the largest error of an affinity, for one sample."""
    exact, read = row.record, cache.record(number)
    assert exact is not None
    order = np.argsort(exact.vision.ids, axis=1), np.argsort(read.vision.ids, axis=1)
    ids = [np.take_along_axis(record.vision.ids, own, 1) for record, own in zip((exact, read), order, strict=True)]
    if not np.array_equal(*ids):
        raise RuntimeError(f"sample {number}: the ids that were read back are not the ids that were stored")
    log_p, log_q = (
        _log_softmax(np.take_along_axis(record.vision.logits, own, 1))
        for record, own in zip((exact, read), order, strict=True)
    )
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    return {"kl": float(kl.mean()), "affinity": float(np.abs(exact.affinity - read.affinity).max())}


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def measure(cached: Path | None = None) -> dict[str, Any]:
    """Return `bytes_per_vision_token` by k and precision, and bytes and error of an affinity entry.

    cached: see `tile_pool`
    """
    pool = tile_pool(K, 24 * POOL, cached)
    found = {f"k={k} {precision}": figures(pool, k, precision) for k, precision in LEVELS}
    return {
        "bytes_per_vision_token": found,
        "affinity_bytes_per_entry": found["k=64 bfloat16"]["affinity_per_entry"],
        "affinity_largest_error": found["k=64 bfloat16"]["largest_affinity_error"],
    }


def show(result: dict[str, Any]) -> str:
    """Return a table in Markdown."""
    names = ("ids_and_logits", "tails", "affinity", "whole_record", "all_files", "kl")
    lines = [" | ".join(["", *names]), "---" + "|---" * len(names)]
    for level, one in result["bytes_per_vision_token"].items():
        lines.append(" | ".join([level, *(f"{one[name]:.1f}" for name in names[:-1]), f"{one['kl']:.1e}"]))
    per_entry, error = result["affinity_bytes_per_entry"], result["affinity_largest_error"]
    return "\n".join([*lines, "", f"affinity: {per_entry:.3f} bytes an entry, largest error {error:.5f}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, help="a file that keeps the tiles, which take minutes to make")
    print(show(measure(parser.parse_args().pool)))


if __name__ == "__main__":
    main()
