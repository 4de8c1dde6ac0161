"""Scenes of handwritten digits and questions about them.

    draw_scenes(generator, n, pool) -> Scenes          arrays
    fresh_scenes(pool, batch_size, seed)               endless batches of arrays
    write_scenes(path, n, pool, seed)                  a Parquet file with PNG images
    file_scenes(n, pool, seed)                         the scenes of such a file, as arrays

A scene is a wide image of 2 rows of 4 cells of 10×10 pixels. A cell is empty or holds one 8×8 digit of scikit-learn's
`load_digits`. The user asks for cells in random order, each at most once, with one word ("b2?": column b, row 2); the
assistant answers with one word ("seven", or "empty").

The digits are split into three pools that share no digit image, so a validation or test scene shows only
digits that no training scene shows.

Shape legend: n scenes, 8 cells row by row (index 4·row + column), q ≤ 8 questions in the order of asking.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from emkd.errors import UsageError

ROWS, COLUMNS = 2, 4  # of cells
N_CELLS = ROWS * COLUMNS
CELL_PIXELS = 10
DIGIT_PIXELS = 8
HEIGHT, WIDTH = ROWS * CELL_PIXELS, COLUMNS * CELL_PIXELS

ANSWERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "empty")
EMPTY = 10  # the label of a cell without a digit; label d stands for digit d
QUESTIONS = tuple(f"{column}{row}?" for row in "12" for column in "abcd")

# The 1,797 digit images are sorted by writer, so the pools also differ in handwriting.
POOLS = {"train": slice(0, 1200), "validation": slice(1200, 1400), "test": slice(1400, 1797)}

EMPTY_SHARE = 0.25
CONTRAST = (0.6, 1.0)
NOISE = 0.05
ROWS_PER_GROUP = 128  # readers keep a few row groups decoded; 128 scenes are about 0.2 MB

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Drawn scenes.

    images:  [n, 20, 40, 3] uint8, the three channels equal
    labels:  [n, 8] int64, 0-9 the cell's digit, 10 empty
    order:   [n, q] int64, the cell that each question asks for
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    order: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, some: slice) -> "Scenes":
        return Scenes(images=self.images[some], labels=self.labels[some], order=self.order[some])

    @property
    def answers(self) -> NDArray[np.int64]:
        """[n, q] the true label of each question, in the order of asking."""
        return np.take_along_axis(self.labels, self.order, axis=1)


@cache
def _all_digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return ([1797, 8, 8] in 0-1, [1797] labels); read-only, because every caller gets the same arrays."""
    data = load_digits()
    pixels, labels = data.images / 16.0, data.target.astype(np.int64)
    pixels.setflags(write=False)
    labels.setflags(write=False)
    return pixels, labels


def pool_digits(pool: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the digit images [m, 8, 8] in 0-1 of a pool, and their labels [m]. Raises UsageError for other pools."""
    if pool not in POOLS:
        raise UsageError(f"there is no pool of digits {pool!r}; expected one of {', '.join(POOLS)}")
    pixels, labels = _all_digits()
    return pixels[POOLS[pool]], labels[POOLS[pool]]


def draw_scenes(generator: np.random.Generator, n: int, pool: str) -> Scenes:
    """Return n scenes with digits of one pool, a pure function of the generator's state."""
    pixels, digit_labels = pool_digits(pool)
    shape = (n, ROWS, COLUMNS)
    chosen = generator.integers(len(pixels), size=shape)
    empty = generator.random(shape) < EMPTY_SHARE
    contrast = np.where(empty, 0.0, generator.uniform(*CONTRAST, size=shape))
    jitter = generator.integers(CELL_PIXELS - DIGIT_PIXELS + 1, size=(2, *shape))
    cells = _place(pixels[chosen] * contrast[..., None, None], jitter)
    canvas = cells.transpose(0, 1, 3, 2, 4).reshape(n, HEIGHT, WIDTH)
    noisy = canvas + NOISE * generator.standard_normal(canvas.shape)
    gray = np.rint(noisy.clip(0, 1) * 255).astype(np.uint8)
    return Scenes(
        images=np.repeat(gray[..., None], 3, axis=-1),
        labels=np.where(empty, EMPTY, digit_labels[chosen]).reshape(n, N_CELLS),
        order=generator.permuted(np.tile(np.arange(N_CELLS), (n, 1)), axis=1),
    )


def _place(digits: NDArray[np.float64], jitter: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return cells [n, 2, 4, 10, 10] with each 8×8 digit at its offset; jitter [2, n, 2, 4]: (down, right), pixels."""
    cells = np.zeros((*digits.shape[:3], CELL_PIXELS, CELL_PIXELS))
    for down in range(CELL_PIXELS - DIGIT_PIXELS + 1):
        for right in range(CELL_PIXELS - DIGIT_PIXELS + 1):
            here = (jitter[0] == down) & (jitter[1] == right)
            window = cells[:, :, :, down : down + DIGIT_PIXELS, right : right + DIGIT_PIXELS]
            window[here] = digits[here]
    return cells


def fresh_scenes(pool: str, batch_size: int, seed: int) -> Iterator[Scenes]:
    """Yield batches of new scenes without end. The same seed yields the same batches."""
    generator = np.random.default_rng(seed)
    while True:
        yield draw_scenes(generator, batch_size, pool)


def file_scenes(n: int, pool: str, seed: int) -> Scenes:
    """Return the scenes that `write_scenes` writes for the same arguments, with the true labels."""
    return draw_scenes(_generators(seed)[0], n, pool)


def _generators(seed: int) -> tuple[np.random.Generator, np.random.Generator]:
    """Return a generator for the scenes and one for mistakes, so that mistakes do not change the scenes."""
    scenes, mistakes = np.random.SeedSequence(seed).spawn(2)
    return np.random.default_rng(scenes), np.random.default_rng(mistakes)


def write_scenes(
    path: Path, n: int, pool: str, seed: int, *, questions: int = N_CELLS, wrong_answers: float = 0.0
) -> Path:
    """Write n scenes as Parquet: id, images (PNG bytes), messages (questions and answers).

    questions:     of each scene: its first ones in the order of asking
    wrong_answers: the share of all answers (rounded to a whole number) that is replaced by one of the 10 other words;
                   images and questions do not depend on it

    Raises UsageError for fewer than 1 scene, questions outside 1-8, or a share outside 0-1.
    """
    if n < 1 or not 1 <= questions <= N_CELLS or not 0 <= wrong_answers <= 1:
        raise UsageError(
            f"expected at least 1 scene, 1-{N_CELLS} questions and a share of wrong answers in 0-1, got {n}, "
            f"{questions} and {wrong_answers}"
        )
    scenes = file_scenes(n, pool, seed)
    answers = with_mistakes(scenes.answers[:, :questions], wrong_answers, _generators(seed)[1])
    rows = [
        {
            "id": f"{pool}-{number:05d}",
            "images": [{"bytes": png(scenes.images[number]), "path": None}],
            "messages": conversation(scenes.order[number, :questions], answers[number]),
        }
        for number in range(n)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, row_group_size=ROWS_PER_GROUP)
    return path


def conversation(order: NDArray[np.int64], answers: NDArray[np.int64]) -> list[dict[str, str]]:
    """Return the user and assistant turns of one scene from order [q] and answers [q]; the image comes first."""
    messages = []
    for turn, (cell, answer) in enumerate(zip(order, answers, strict=True)):
        mark = "" if turn else "<image>"
        messages.append({"role": "user", "content": mark + QUESTIONS[cell]})
        messages.append({"role": "assistant", "content": ANSWERS[answer]})
    return messages


def with_mistakes(
    answers: NDArray[np.int64], share: float, generator: np.random.Generator, n_words: int = len(ANSWERS)
) -> NDArray[np.int64]:
    """Return answers [n, q] with a share of them replaced, uniformly over the other words. n_words: of all answers"""
    found = answers.copy().reshape(-1)
    wrong = generator.choice(found.size, size=round(share * found.size), replace=False)
    found[wrong] = (found[wrong] + generator.integers(1, n_words, size=wrong.size)) % n_words
    return found.reshape(answers.shape)


def png(image: NDArray[np.uint8]) -> bytes:
    """Encode [height, width, 3] uint8 as an RGB PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()
