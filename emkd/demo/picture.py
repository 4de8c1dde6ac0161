"""A picture of one scene with the pairs that the matching finds: the teacher's tokens left, the student's right."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from emkd.demo.models import PATCHES_PER_SIDE
from emkd.demo.pairs import Scene, Shown

SIDE, GAP, MARGIN = 400, 160, 20  # pixels of the picture
GRID = (90, 90, 110)
# By what a pair has in common.
COLOURS = {"content and place": (70, 200, 110), "content": (240, 190, 60), "nothing": (235, 80, 80)}
BACKGROUND, TEXT = (24, 24, 30), (225, 225, 230)


def draw_pairs(image: Image.Image, pads: bool, scene: Scene, matching: str, own: Shown, theirs: Shown) -> Image.Image:
    """Draw one scene as both models see it, and a line for each pair.

    image: the scene's;  pads: whether the student's processor pads, as the teacher's does
    own, theirs: what the tokens of student and teacher show, for this scene alone
    """
    canvas = Image.new("RGB", (2 * SIDE + GAP + 2 * MARGIN, SIDE + 4 * MARGIN), BACKGROUND)
    left, right = (MARGIN, MARGIN), (MARGIN + SIDE + GAP, MARGIN)
    for corner, padded in ((left, True), (right, pads)):
        canvas.paste(_seen(image, padded), corner)
    pen = ImageDraw.Draw(canvas)
    pool = PATCHES_PER_SIDE // int(len(own.cells) ** 0.5)
    _grid(pen, left, PATCHES_PER_SIDE)
    _grid(pen, right, PATCHES_PER_SIDE // pool)
    for i, j in zip(*(part.tolist() for part in scene.pairs(matching)), strict=True):
        start, end = _middle(left, j, len(theirs.cells)), _middle(right, i, len(own.cells))
        pen.line((*start, *end), fill=COLOURS[_common(i, j, own, theirs)], width=2)
        for x, y in (start, end):
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=COLOURS[_common(i, j, own, theirs)])
    _legend(pen, len(theirs.cells), len(own.cells), "padded" if pads else "stretched")
    return canvas


def scene_image(data: Path, number: int) -> Image.Image:
    """Return the image of row `number` of a file of scenes."""
    stored = pq.read_table(data, columns=["images"])["images"][number][0]["bytes"].as_py()
    return Image.open(io.BytesIO(stored))


def _seen(image: Image.Image, padded: bool) -> Image.Image:
    """Return what a processor makes of a scene, enlarged."""
    if not padded:
        return image.resize((SIDE, SIDE), Image.Resampling.NEAREST)
    square = Image.new("RGB", (image.width, image.width), (127, 127, 127))
    square.paste(image, (0, (image.width - image.height) // 2))
    return square.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def _grid(pen: ImageDraw.ImageDraw, corner: tuple[int, int], n: int) -> None:
    for k in range(n + 1):
        at = k * SIDE // n
        pen.line((corner[0] + at, corner[1], corner[0] + at, corner[1] + SIDE), fill=GRID)
        pen.line((corner[0], corner[1] + at, corner[0] + SIDE, corner[1] + at), fill=GRID)


def _middle(corner: tuple[int, int], token: int, n_tokens: int) -> tuple[int, int]:
    side = int(n_tokens**0.5)
    row, column = divmod(token, side)
    return corner[0] + (2 * column + 1) * SIDE // (2 * side), corner[1] + (2 * row + 1) * SIDE // (2 * side)


def _common(i: int, j: int, own: Shown, theirs: Shown) -> str:
    if _only(own.contents)[i] != _only(theirs.contents)[j]:
        return "nothing"
    return "content and place" if own.cells[i] == theirs.cells[j] else "content"


def _only(contents: NDArray[np.int64]) -> NDArray[np.int64]:
    (row,) = contents
    return row


def _legend(pen: ImageDraw.ImageDraw, n_teacher: int, n_student: int, prepared: str) -> None:
    x, y = MARGIN, SIDE + 2 * MARGIN
    pen.text((x, y), f"teacher: {n_teacher} tokens, padded", fill=TEXT)
    pen.text((MARGIN + SIDE + GAP, y), f"student: {n_student} tokens, {prepared}", fill=TEXT)
    pen.text((x, y + MARGIN), "matched tokens have in common:", fill=TEXT)
    x += 220
    for name, colour in COLOURS.items():
        pen.text((x, y + MARGIN), name, fill=colour)
        x += 150
