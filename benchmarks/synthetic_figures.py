"""What the samples of synthetic_records.py are like, and whether composing them of a pool is fair.

    python benchmarks/synthetic_figures.py POOL.npz

`affinity_figures`: mean, spread and smoothness of the cosines, and bytes an entry as plain zstd of int8 and as our
format stores it. `bytes_against_distinct`: bytes of ids and logits of tiles as samples get them (mirrored, rolled),
against the same number of tiles of the pool as they were made. A chunk never has the same tile twice, so this is all
that composing can change.
"""

import argparse
from pathlib import Path
from typing import Any

import numcodecs.zstd
import numpy as np
from numpy.typing import NDArray
from synthetic_records import POOL, SIDE, TILE, D, Pool, affinity, tile_pool, token_order

from emkd.storage.arrays.affinity import along_tokens
from emkd.storage.arrays.chunks import encode_chunk
from emkd.storage.arrays.ids import split_ids
from emkd.storage.arrays.layout import TOKENS_PER_CHUNK, ArrayLayout
from emkd.storage.arrays.logits import by_rank, to_keys
from emkd.storage.precision import encode_affinity, encode_logits

K_ANSWERS = 6144  # of a pool for shards of 256 samples


def affinity_figures(pool: Pool, n: int = 8, tiles: int = 4) -> dict[str, float]:
    """Of n samples of that many tiles each (4 make 2,916 vision tokens)."""
    rng = np.random.default_rng(5)
    common = rng.standard_normal(D).astype(np.float32)
    found, plain, ours = [], 0, 0
    for _ in range(n):
        chosen = rng.choice(POOL, tiles, replace=False)
        found.append(affinity(pool.states[chosen].reshape(-1, D), common, rng))
        codes = encode_affinity(found[-1], "int8")
        plain += len(numcodecs.zstd.compress(np.ascontiguousarray(codes), 3))
        stored = along_tokens(np.ascontiguousarray(codes.T)).reshape(-1)
        layout = ArrayLayout(name="affinity", axis="affinity", dtype=stored.dtype, shuffle="noshuffle")
        ours += len(encode_chunk(layout, stored))
    whole = np.stack(found)
    grids = whole.reshape(n, -1, tiles, SIDE, SIDE)
    shares = (grids[..., 1:] - whole.mean()) * (grids[..., :-1] - whole.mean())
    return {
        "mean": float(whole.mean()),
        "std": float(whole.std()),
        "percentile_1": float(np.percentile(whole, 1)),
        "percentile_99": float(np.percentile(whole, 99)),
        "correlation_of_neighbours": float(shares.mean() / whole.var()),
        "plain_zstd_bytes_per_entry": plain / whole.size,
        "ours_zstd_bytes_per_entry": ours / whole.size,
        "largest_error": float(max(np.abs(encode_affinity(one, "int8") / 127 - one).max() for one in found)),
    }


def bytes_against_distinct(pool: Pool, repeats: int = 5) -> dict[str, Any]:
    """Bytes a token of the tiles of one chunk, as they are and as other pictures."""
    n = TOKENS_PER_CHUNK // TILE
    rng = np.random.default_rng(6)
    plain, composed = [], []
    for _ in range(repeats):
        chosen = rng.choice(POOL, n, replace=False)
        orders = [token_order(int(variant)) for variant in rng.integers(0, 8 * SIDE, n)]
        same = [np.arange(TILE)] * n
        plain.append(_bytes_per_token(pool, chosen, same))
        composed.append(_bytes_per_token(pool, chosen, orders))
    return {
        "distinct": float(np.mean(plain)),
        "composed": float(np.mean(composed)),
        "ratio": float(np.mean(composed) / np.mean(plain)),
    }


def _bytes_per_token(pool: Pool, chosen: NDArray[np.int64], orders: list[NDArray[np.int64]]) -> float:
    ids, logits = (
        np.concatenate([pool.tiles[name][tile][order] for tile, order in zip(chosen, orders, strict=True)])
        for name in ("ids", "logits")
    )
    low, high = split_ids(ids)
    keys = by_rank(to_keys(encode_logits(logits, "bfloat16")))
    total = 0
    for name, array, shuffle in (("low", low, "shuffle"), ("high", high, "bitshuffle"), ("keys", keys, "bitshuffle")):
        layout = ArrayLayout(name=name, axis="vision", dtype=array.dtype, width=pool.k, shuffle=shuffle)  # type: ignore[arg-type]
        total += len(encode_chunk(layout, array))
    return total / len(ids)


def measure(pool_file: Path) -> dict[str, Any]:
    pool = tile_pool(64, K_ANSWERS, pool_file)
    return {"affinity": affinity_figures(pool), "bytes_per_token": bytes_against_distinct(pool)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", type=Path, help="made there if it is not there: some minutes")
    for part, figures in measure(parser.parse_args().pool).items():
        print(f"\n{part}\n---")
        print("\n".join(f"{name} | {figure:.4f}" for name, figure in figures.items()))


if __name__ == "__main__":
    main()
