"""Synthetic records of a large teacher: the samples that the storage benchmarks write and read.

    tile_pool -> sample_rows -> CapturedRow with a Record: vision top-k and tails, affinity, answers

**Vision tokens** are those of `synthetic_logits`, V = 151,936, in tiles of 27 x 27. Samples have 1, 1, 2, 2, 3 and 4
tiles in turn (mean 1,580 tokens); each tile is a separate image. The top-k of a tile takes seconds (some 110
million logits), so a pool of POOL distinct tiles is made once and samples are composed of them, without making a
compressor's work easier: a tile returns only after all other tiles (POOL * 729 = 23,328 tokens later; a chunk has
16,384), and then as a different image, mirrored or transposed and with its rows rolled. No image occurs twice. A roll
cuts one seam into a tile's 27 rows.

**Affinity** is of 200 text tokens. At the last layer of trained models hidden states are anisotropic: they share a
large component, so that cosines are mostly positive. Here a shared direction has COMMON of a state's energy, for text
and vision alike, which gives a mean of about COMMON. The rest of a text token is a vision token that it is about
(ABOUT of the energy), the topic of the text at that position (TOPIC: an autoregressive walk, so that nearby tokens
resemble each other), and white noise. The directions come from d = 256 dimensions: real states have more, but their
variance is in few of them. Nobody measured whether the result resembles real models: mean, spread and smoothness are
an assumption, and the spread decides how many bytes an entry takes. Measured once on 8 samples of 4 tiles: mean 0.25,
std 0.064, correlation of neighbours 0.83; int8 takes 0.63 bytes an entry with plain zstd.

Shape legend: n tokens, L text and Nt vision tokens of a sample, d hidden size, k stored logits
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common.synthetic_logits import Synthetic, answers, lm_head, sharpness, vision_states
from emkd.storage.record import CapturedRow, ImageSpan, Record, RowHint, TopLogits

V = 151_936
SIDE = 27
TILE = SIDE * SIDE
POOL = 32
TILES = (1, 1, 2, 2, 3, 4)  # tiles of the samples, in turn
N_TEXT, N_ANSWER = 200, 24
SCALE, D = 3.5, 256
COMMON = 0.25
ABOUT, TOPIC = 0.4, 0.3
MEMORY = 0.9  # of a topic, from one text token to the next

FIELDS = ("ids", "logits", "tail_logsumexp", "tail_mean")

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Pool:
    """What samples are composed of.

    states:  [POOL, TILE, d] of RMS 1
    tiles:   POOL distributions of TILE tokens
    answers: of the answer tokens
    """

    states: NDArray[np.float32]
    tiles: list[TopLogits]
    answers: TopLogits


def tile_pool(k: int, n_answers: int, cached: Path | None = None, seed: int = 0) -> Pool:
    """Return distinct tiles and answer tokens.

    cached: a file to read them from, if it exists (made by the same arguments), or else to write them to
    """
    if cached is not None and cached.exists():
        with np.load(cached) as found:
            return _unpacked(dict(found))
    rng = np.random.default_rng(seed)
    head = lm_head(V, D, rng)
    states, cuts = [], []
    for _ in range(POOL):
        states.append(vision_states((SIDE, SIDE), D, rng))
        hidden = states[-1] * sharpness((SIDE, SIDE), rng) * SCALE / D**0.5
        cuts.append(Synthetic(hidden=hidden, head=head).cut(k).top_logits())
    teacher = Synthetic(hidden=states[0], head=head)
    pool = Pool(
        states=np.stack([one.numpy() for one in states]),
        tiles=cuts,
        answers=answers(teacher, n_answers).cut(k).top_logits(),
    )
    if cached is not None:
        cached.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cached, **_packed(pool))  # type: ignore[arg-type]
    return pool


def sample_rows(
    pool: Pool, n: int, per_shard: int, seed: int = 1, tiles: Sequence[int] = TILES
) -> Iterator[CapturedRow]:
    """Yield n rows. Answer tokens do not repeat within a shard of `per_shard` rows.

    tiles: number of tiles of the samples, in turn
    """
    rng = np.random.default_rng(seed)
    images = _images(rng)
    common = rng.standard_normal(D).astype(np.float32)
    answer_order: NDArray[np.int64] = np.zeros(0, np.int64)
    for row in range(n):
        if row % per_shard == 0:
            answer_order = rng.permutation(len(pool.answers))
        chosen = [next(images) for _ in range(tiles[row % len(tiles)])]
        first = row % per_shard * N_ANSWER
        record = _record(pool, row, chosen, answer_order[first : first + N_ANSWER], common, rng)
        yield CapturedRow(hint=RowHint(row=row, id=f"sample-{row}"), key=record.key, record=record)


def affinity(states: NDArray[np.float32], common: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Return cosines [L, Nt] of text tokens with the vision tokens [Nt, d] that they are about."""
    about = states[rng.integers(0, len(states), N_TEXT)]
    topic = _walk(rng)
    white = rng.standard_normal((N_TEXT, D), dtype=np.float32)
    own = ABOUT**0.5 * _unit(about) + TOPIC**0.5 * _unit(topic) + (1 - ABOUT - TOPIC) ** 0.5 * _unit(white)
    text, vision = (_unit(COMMON**0.5 * _unit(common) + (1 - COMMON) ** 0.5 * _unit(x)) for x in (own, states))
    return np.clip(text @ vision.T, -1, 1)


def _walk(rng: np.random.Generator) -> NDArray[np.float32]:
    """Return [L, d]; each row keeps MEMORY of the row before it."""
    steps = rng.standard_normal((N_TEXT, D), dtype=np.float32)
    for i in range(1, N_TEXT):
        steps[i] = MEMORY * steps[i - 1] + (1 - MEMORY**2) ** 0.5 * steps[i]
    return steps


def _unit(states: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale each row to length 1."""
    return (states / np.linalg.norm(states, axis=-1, keepdims=True)).astype(np.float32)


def _images(rng: np.random.Generator) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield (tile of the pool, order of its tokens): tiles in turn, each time as a different image."""
    variants = [rng.permutation(8 * SIDE) for _ in range(POOL)]
    for round_ in range(8 * SIDE):
        for tile in range(POOL):
            yield tile, token_order(int(variants[tile][round_]))
    raise ValueError(f"the samples need more than {8 * SIDE * POOL} tiles; increase POOL")


def token_order(variant: int) -> NDArray[np.int64]:
    """Return the tokens [TILE] of a tile as a different image: one of 8 symmetries, rows rolled by up to SIDE - 1."""
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
    states = np.concatenate([pool.states[tile][order] for tile, order in chosen])
    images = tuple(
        ImageSpan(text_position=10, start=i * TILE, count=TILE, grids=((SIDE, SIDE),), original_size=(384, 384))
        for i in range(len(chosen))
    )
    return Record(
        key=f"{row:064x}",
        text_ids=np.minimum(rng.zipf(1.3, N_TEXT), V - 1).astype(np.int32),
        images=images,
        vision=TopLogits.joined(
            [pool.tiles[tile].map(lambda array, order=order: array[order]) for tile, order in chosen]
        ),
        affinity=affinity(states, common, rng),
        answer_positions=np.arange(N_TEXT - N_ANSWER, N_TEXT, dtype=np.int32),
        answer=replace(pool.answers.map(lambda array: array[answer]), tail_mean=None),
    )


def _packed(pool: Pool) -> Arrays:
    tiles = {f"tiles_{name}": np.stack([getattr(tile, name) for tile in pool.tiles]) for name in FIELDS}
    return {"states": pool.states, **tiles, **{f"answers_{name}": getattr(pool.answers, name) for name in FIELDS}}


def _unpacked(flat: Arrays) -> Pool:
    return Pool(
        states=flat["states"],
        tiles=[TopLogits(**{name: flat[f"tiles_{name}"][tile] for name in FIELDS}) for tile in range(POOL)],
        answers=TopLogits(**{name: flat[f"answers_{name}"] for name in FIELDS}),
    )
