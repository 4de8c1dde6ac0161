"""Whole samples of a large teacher, made from nothing: what benchmarks of storage write and read.

    tile_pool -> sample_rows -> CapturedRow with a Record: vision top-k and tails, affinity, answers

**Vision tokens** are those of `synthetic`, V = 151,936, in tiles of 27 x 27; samples have 1, 1, 2, 2, 3 and 4 of them
in turn (mean 1,580 tokens), an image each. Top-k of some 300 million logits takes seconds a tile, so a pool of POOL
distinct tiles is made once, and samples are composed of them without making a compressor's work easier: a tile comes
again only after all others (POOL * 729 = 23,328 tokens later, a chunk has 16,384), and then as another picture,
mirrored or transposed and with its rows rolled; no picture comes twice. A roll cuts one seam into a tile's 27 rows.
`bytes_against_distinct` compares the bytes of such tiles with those of the pool itself.

**Affinity** is of 200 text tokens. At the last layer of trained models hidden states are anisotropic: all of them
share a large component, so that cosines are mostly positive. Here a shared direction has COMMON of a state's energy,
for text and vision alike, which gives a mean of about COMMON. The rest of a text token is a vision token that it is
about (ABOUT of the energy), what the text at that place is about (TOPIC: an autoregressive walk, so that tokens near
each other are alike), and white noise. The directions come from d = 256 dimensions: real states have more, but their
variance is in few of them. That the result resembles real models was not measured: mean, spread and smoothness are an
assumption, and the spread decides how many bytes an entry takes. Measured by synthetic_figures.py: mean 0.25, std
0.064, correlation of neighbours 0.83; int8 takes 0.63 bytes an entry with plain zstd.

Shape legend: n tokens, L text and Nt vision tokens of a sample, d hidden size, k stored logits
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from synthetic import Synthetic, answers, lm_head, sharpness, vision_states

from emkd.storage.record import CapturedRow, ImageSpan, Record, RowHint
from emkd.vlm.truncated import TruncatedLogits

V = 151_936
SIDE = 27
TILE = SIDE * SIDE
POOL = 32
TILES = (1, 1, 2, 2, 3, 4)  # of the samples, in turn
N_TEXT, N_ANSWER = 200, 24
SCALE, D = 3.5, 256
COMMON = 0.25
ABOUT, TOPIC = 0.4, 0.3
MEMORY = 0.9  # of a topic, from text token to text token

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Pool:
    """states [POOL, TILE, d] of RMS 1; tiles and answers: ids, logits, tail_logsumexp, tail_mean, [POOL, TILE, ...] and
    [n, ...]"""

    states: NDArray[np.float32]
    tiles: Arrays
    answers: Arrays

    @property
    def k(self) -> int:
        return int(self.tiles["ids"].shape[-1])


def tile_pool(k: int, n_answers: int, cached: Path | None = None, seed: int = 0) -> Pool:
    """Distinct tiles and answer tokens; from the file `cached`, if it is there (it is of the same arguments)."""
    if cached is not None and cached.exists():
        with np.load(cached) as found:
            return _unpacked(dict(found))
    rng = np.random.default_rng(seed)
    head = lm_head(V, D, rng)
    states, cuts = [], []
    for _ in range(POOL):
        states.append(vision_states((SIDE, SIDE), D, rng))
        hidden = states[-1] * sharpness((SIDE, SIDE), rng) * SCALE / D**0.5
        cuts.append(_numbers(Synthetic(hidden=hidden, head=head).cut(k)))
    teacher = Synthetic(hidden=states[0], head=head)
    flat = {f"tiles_{name}": np.stack([cut[name] for cut in cuts]) for name in cuts[0]}
    flat |= {f"answers_{name}": array for name, array in _numbers(answers(teacher, n_answers).cut(k)).items()}
    flat["states"] = np.stack([one.numpy() for one in states])
    if cached is not None:
        cached.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cached, **flat)  # type: ignore[arg-type]
    return _unpacked(flat)


def sample_rows(
    pool: Pool, n: int, per_shard: int, seed: int = 1, tiles: Sequence[int] = TILES
) -> Iterator[CapturedRow]:
    """`n` rows, one after the other, of so many tiles in turn. Answer tokens do not repeat within a shard of
    `per_shard` rows."""
    rng = np.random.default_rng(seed)
    pictures = _pictures(rng)
    common = rng.standard_normal(D).astype(np.float32)
    answer_order: NDArray[np.int64] = np.zeros(0, np.int64)
    for row in range(n):
        if row % per_shard == 0:
            answer_order = rng.permutation(len(pool.answers["ids"]))
        chosen = [next(pictures) for _ in range(tiles[row % len(tiles)])]
        first = row % per_shard * N_ANSWER
        record = _record(pool, row, chosen, answer_order[first : first + N_ANSWER], common, rng)
        yield CapturedRow(hint=RowHint(row=row, id=f"sample-{row}"), key=record.key, record=record)


def affinity(states: NDArray[np.float32], common: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """[L, Nt] cosines of text tokens with the vision tokens [Nt, d] that they are about."""
    about = states[rng.integers(0, len(states), N_TEXT)]
    topic = _walk(rng)
    white = rng.standard_normal((N_TEXT, D), dtype=np.float32)
    own = ABOUT**0.5 * _unit(about) + TOPIC**0.5 * _unit(topic) + (1 - ABOUT - TOPIC) ** 0.5 * _unit(white)
    text, vision = (_unit(COMMON**0.5 * _unit(common) + (1 - COMMON) ** 0.5 * _unit(x)) for x in (own, states))
    return np.clip(text @ vision.T, -1, 1)


def _walk(rng: np.random.Generator) -> NDArray[np.float32]:
    """[L, d] of which each row is MEMORY of the one before it."""
    steps = rng.standard_normal((N_TEXT, D), dtype=np.float32)
    for i in range(1, N_TEXT):
        steps[i] = MEMORY * steps[i - 1] + (1 - MEMORY**2) ** 0.5 * steps[i]
    return steps


def _unit(states: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of length 1."""
    return (states / np.linalg.norm(states, axis=-1, keepdims=True)).astype(np.float32)


def _pictures(rng: np.random.Generator) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """(tile of the pool, order of its tokens): tiles in turn, each time as another picture."""
    variants = [rng.permutation(8 * SIDE) for _ in range(POOL)]
    for round_ in range(8 * SIDE):
        for tile in range(POOL):
            yield tile, token_order(int(variants[tile][round_]))
    raise ValueError(f"more than {8 * SIDE * POOL} tiles are asked for; make POOL larger")


def token_order(variant: int) -> NDArray[np.int64]:
    """[TILE] the tokens of a tile as another picture: one of 8 symmetries, rows rolled by up to SIDE - 1."""
    grid = np.arange(TILE).reshape(SIDE, SIDE)
    symmetry, roll = variant % 8, variant // 8
    grid = grid.T if symmetry & 1 else grid
    grid = grid[:: -1 if symmetry & 2 else 1, :: -1 if symmetry & 4 else 1]
    return np.roll(grid, roll, axis=0).reshape(-1)


def _record(
    pool: Pool,
    row: int,
    chosen: list[tuple[int, NDArray[np.int64]]],
    answer: NDArray[np.int64],
    common: NDArray[np.float32],
    rng: np.random.Generator,
) -> Record:
    vision = {
        name: np.concatenate([array[tile][order] for tile, order in chosen]) for name, array in pool.tiles.items()
    }
    states = np.concatenate([pool.states[tile][order] for tile, order in chosen])
    images = tuple(
        ImageSpan(text_position=10, start=i * TILE, count=TILE, grids=((SIDE, SIDE),), original_size=(384, 384))
        for i in range(len(chosen))
    )
    return Record(
        key=f"{row:064x}",
        text_ids=np.minimum(rng.zipf(1.3, N_TEXT), V - 1).astype(np.int32),
        images=images,
        **{f"vision_{name}": array for name, array in vision.items()},
        affinity=affinity(states, common, rng),
        answer_positions=np.arange(N_TEXT - N_ANSWER, N_TEXT, dtype=np.int32),
        **{f"answer_{name}": array[answer] for name, array in pool.answers.items() if name != "tail_mean"},
    )


def _numbers(cut: TruncatedLogits) -> Arrays:
    return {
        "ids": cut.ids.numpy().astype(np.int32),
        "logits": cut.logits.float().numpy(),
        "tail_logsumexp": cut.tail_logsumexp.float().numpy(),
        "tail_mean": cut.tail_mean.float().numpy(),  # type: ignore[union-attr]
    }


def _unpacked(flat: Arrays) -> Pool:
    parts = {
        kind: {name.removeprefix(f"{kind}_"): array for name, array in flat.items() if name.startswith(f"{kind}_")}
        for kind in ("tiles", "answers")
    }
    return Pool(states=flat["states"], **parts)
