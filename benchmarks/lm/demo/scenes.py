"""Pictures of words, and questions about them.

    draw_scenes(generator, n) -> Scenes     arrays
    fresh_scenes(batch_size, seed)          endless batches of arrays
    file_scenes(n, split)                   the scenes of a file, as arrays
    write_scenes(path, n, split, ...)       a Parquet file with PNG pictures

A picture is wide: 2 rows of 4 cells of 32 x 32 pixels, and each cell holds a word, in light letters at a place, a
brightness and with noise of its own. The user asks for cells by their letter ("Read f": a to h, row by row), and the
assistant answers with the word.

The geometry is that of emkd/demo/scenes.py at 3.2 times its size: places.py holds for both.

Shape legend: n scenes, 8 cells row by row (index 4·row + column), q ≤ 8 questions in the order of asking.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from emkd.demo.places import NOWHERE
from emkd.demo.scenes import COLUMNS, N_CELLS, ROWS, SCHEMA, png, with_mistakes

CELL_PIXELS = 32
HEIGHT, WIDTH = ROWS * CELL_PIXELS, COLUMNS * CELL_PIXELS
FONT_SIZE = 12
JITTER = 2  # pixels that a word may lie away from the middle of its cell, each way

# Each is one token of SmolLM2's tokenizer, with the space before it.
WORDS = (
    "tree", "fish", "bird", "moon", "star", "king", "ship", "boat", "road", "book", "door", "fire",
    "snow", "rain", "wind", "leaf", "gold", "milk", "salt", "hand", "foot", "nose", "cake", "lake",
)  # fmt: skip
PADDING = len(WORDS)  # the content of a vision token that shows nothing of the scene
CELLS = tuple("abcdefgh")

SEEDS = {"align": 1, "train": 2, "validation": 3, "test": 4}
CONTRAST = (0.5, 1.0)
NOISE = 0.1


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """images: [n, 64, 128, 3] uint8;  labels: [n, 8] index into WORDS;  order: [n, q] the cell of each question"""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    order: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def answers(self) -> NDArray[np.int64]:
        """[n, q] the right label of each question."""
        return np.take_along_axis(self.labels, self.order, axis=1)

    def contents(self, cells: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return what each vision token shows, [n, t]: a label, or PADDING. cells: `places` [t]"""
        return np.where(cells == NOWHERE, PADDING, self.labels[:, cells])


@cache
def _drawn(word: str) -> NDArray[np.float64]:
    """Return the letters of a word as [height, width] in 0-1, cut to the word's own box."""
    canvas = Image.new("L", (2 * CELL_PIXELS, CELL_PIXELS))
    ImageDraw.Draw(canvas).text((2, 2), word, fill=255, font=ImageFont.load_default(FONT_SIZE))
    pixels = np.asarray(canvas.crop(canvas.getbbox()), dtype=np.float64) / 255
    pixels.setflags(write=False)
    return pixels


def draw_scenes(generator: np.random.Generator, n: int) -> Scenes:
    """Return n scenes, a pure function of the generator's state."""
    labels = generator.integers(len(WORDS), size=(n, N_CELLS))
    jitter = generator.integers(-JITTER, JITTER + 1, size=(n, N_CELLS, 2))
    contrast = generator.uniform(*CONTRAST, size=(n, N_CELLS))
    canvas = np.zeros((n, HEIGHT, WIDTH))
    for number, cell in np.ndindex(n, N_CELLS):
        word = _drawn(WORDS[labels[number, cell]])
        corner = np.array(divmod(cell, COLUMNS)) * CELL_PIXELS
        free = CELL_PIXELS - np.array(word.shape)
        top, left = corner + (free // 2 + jitter[number, cell]).clip(0, free)
        canvas[number, top : top + word.shape[0], left : left + word.shape[1]] = contrast[number, cell] * word
    noisy = canvas + NOISE * generator.standard_normal(canvas.shape)
    gray = np.rint(noisy.clip(0, 1) * 255).astype(np.uint8)
    order = generator.permuted(np.tile(np.arange(N_CELLS), (n, 1)), axis=1)
    return Scenes(images=np.repeat(gray[..., None], 3, axis=-1), labels=labels, order=order)


def fresh_scenes(batch_size: int, seed: int) -> Iterator[Scenes]:
    """Yield batches of new scenes without end. The same seed yields the same batches, and no file's scenes."""
    generator = np.random.default_rng([seed, len(SEEDS)])
    while True:
        yield draw_scenes(generator, batch_size)


def file_scenes(n: int, split: str) -> Scenes:
    """Return the n scenes of a split's file."""
    return draw_scenes(np.random.default_rng(SEEDS[split]), n)


def conversation(order: NDArray[np.int64], answers: NDArray[np.int64]) -> list[dict[str, str]]:
    """Return the user and assistant turns of one scene from order [q] and answers [q]; the picture comes first."""
    messages = []
    for turn, (cell, answer) in enumerate(zip(order, answers, strict=True)):
        mark = "" if turn else "<image>"
        messages.append({"role": "user", "content": f"{mark}Read {CELLS[cell]}"})
        messages.append({"role": "assistant", "content": WORDS[answer]})
    return messages


def write_scenes(path: Path, n: int, split: str, *, questions: int = N_CELLS, wrong_answers: float = 0.0) -> None:
    """Write n scenes as Parquet: id, images (PNG bytes), messages.

    questions: of each scene;  wrong_answers: share of all answers that is replaced by another word
    """
    scenes = file_scenes(n, split)
    answers = with_mistakes(
        scenes.answers[:, :questions], wrong_answers, np.random.default_rng([SEEDS[split], 1]), len(WORDS)
    )
    rows = [
        {
            "id": f"{split}-{number:05d}",
            "images": [{"bytes": png(scenes.images[number]), "path": None}],
            "messages": conversation(scenes.order[number, :questions], answers[number]),
        }
        for number in range(n)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, row_group_size=128)
