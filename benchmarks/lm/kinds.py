"""Three kinds of vision tokens for a language model, as grids of input embeddings [images, 24 * 24, d].

    A  text         576 tokens of real text, row by row
    B  photographs  16 x 16 patches of photographs, through a small encoder and projector trained to name their colours
    C  smooth       soft mixtures of a few word embeddings, which change slowly over the grid

Shape legend: n images, d width of an embedding
"""

import pydoc_data.topics
from collections.abc import Callable

import numpy as np
import torch
from sklearn.datasets import load_sample_images

SIDE = 24
TOKENS = SIDE * SIDE
PATCH = 16
COLOURS = ("red", "green", "blue", "yellow", "orange", "brown", "grey", "white", "black", "pink", "purple", "cyan")
RGB = (
    (200, 40, 40), (60, 140, 60), (60, 90, 190), (220, 210, 60), (230, 140, 40), (110, 70, 40), (128, 128, 128),
    (240, 240, 240), (20, 20, 20), (230, 150, 170), (120, 60, 150), (80, 190, 200),
)  # fmt: skip


def corpus() -> str:
    """Return about 700 kB of English prose that every Python carries: the reference of the language."""
    return "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))


def text(n: int, embed: Callable[[torch.Tensor], torch.Tensor], ids: list[int]) -> torch.Tensor:
    """Return kind A. ids: of the corpus, of which every image takes others"""
    grids = torch.tensor(ids[: n * TOKENS]).view(n, TOKENS)
    return embed(grids)


def smooth(n: int, embed: Callable[[torch.Tensor], torch.Tensor], ids: list[int]) -> torch.Tensor:
    """Return kind C."""
    generator = torch.Generator().manual_seed(0)
    words = embed(torch.tensor(ids)[torch.randint(0, len(ids), (n, 6), generator=generator)])
    centres = torch.rand(n, 6, 2, generator=generator) * SIDE
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    squared = (rows.flatten()[:, None] - centres[:, None, :, 0]) ** 2
    squared = squared + (columns.flatten()[:, None] - centres[:, None, :, 1]) ** 2
    return torch.softmax(-squared / 60, dim=2) @ words


def photographs(n: int, embed: Callable[[torch.Tensor], torch.Tensor], words: torch.Tensor) -> torch.Tensor:
    """Return kind B. words: ids [12] of COLOURS"""
    pixels = torch.tensor(_crops(n)).float() / 255
    patches = pixels.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).permute(0, 1, 2, 4, 5, 3)
    flat = patches.reshape(n * TOKENS, -1)
    palette = torch.tensor(RGB).float() / 255
    named = torch.cdist(patches.reshape(n * TOKENS, -1, 3).mean(dim=1), palette).argmin(dim=1)
    torch.manual_seed(0)
    names = embed(words)
    encoder = torch.nn.Sequential(torch.nn.Linear(flat.shape[1], 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
    projector = torch.nn.Sequential(torch.nn.GELU(), torch.nn.Linear(64, names.shape[1]))
    both = torch.nn.Sequential(encoder, projector)
    optimizer = torch.optim.Adam(both.parameters(), lr=1e-3)
    normalized = torch.nn.functional.normalize(names, dim=1)
    for _ in range(300):
        batch = torch.randint(0, len(flat), (256,))
        found = torch.nn.functional.normalize(both(flat[batch]), dim=1)
        loss = torch.nn.functional.cross_entropy(20 * found @ normalized.T, named[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        tokens = both(flat)
        tokens = tokens / tokens.norm(dim=1, keepdim=True) * names.norm(dim=1).mean()
    return tokens.view(n, TOKENS, -1)


def _crops(n: int) -> np.ndarray:
    """[n, 384, 384, 3] crops of two photographs, at other places and scales."""
    rng, images = np.random.default_rng(0), load_sample_images().images
    side, found = SIDE * PATCH, []
    for i in range(n):
        image = images[i % 2]
        top, left = (int(rng.integers(0, size - side + 1)) for size in image.shape[:2])
        crop = image[top : top + side, left : left + side]
        found.append(crop[:, ::-1] if i % 4 > 1 else crop)
    return np.stack(found)
