"""Synthetic logits that resemble those of a large model's vision tokens. docs/method.md shows what they measure.

The LM head is W [V, d] ~ N(0, 1) with a bias of -log(rank + 20); ids are ranked by id x LogNormal(0, 1), which gives a
Zipfian vocabulary whose small ids are frequent. Hidden states of an image are 80% (of the variance) noise blurred over
the grid of tokens by a Gaussian of 2 tokens and 20% white noise, RMS-normed, so that neighbours resemble each other.
Logits are 3.5 · sharpness · W h / √d + bias, with a smooth sharpness of 0.6 to 1.6, rounded to bfloat16.

Tokens that predict answers are independent white noise with a sharpness between 1 and 3: from undecided to certain
(half of them give their top id less than 0.5, one in ten more than 0.9). A text token is the sum of a vision token and
white noise in equal parts, so that each text token is near a part of the image.

Shape legend: n tokens, d hidden size, V ids, k largest logits
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from emkd.pipeline.topk import top_k
from emkd.vlm.head import LMHead
from emkd.vlm.truncated import TruncatedLogits, truncated

BLUR = 2.0
SHARPNESS = (0.6, 1.6)
ANSWER_SHARPNESS = (1.0, 3.0)
SCALE = 3.5


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """A teacher's LM head and hidden states [n, d] of n tokens, sharpness and scale included."""

    hidden: torch.Tensor
    head: LMHead

    def logits(self, rows: slice = slice(None)) -> torch.Tensor:
        """Return logits [n, V] in float32, rounded to bfloat16."""
        (found,) = self.head.blocks(self.hidden[rows], self.head.n_tokens)
        return found.bfloat16().float()

    def cut(self, k: int, chunk: int = 64) -> TruncatedLogits:
        """Return top-k and tail of all tokens, as a cache holds them, computed `chunk` tokens at a time."""
        parts = [top_k(self.logits(slice(i, i + chunk)), k) for i in range(0, len(self.hidden), chunk)]
        fields = [torch.cat([getattr(p, name) for p in parts]) for name in ("ids", "logits", "tail_logsumexp")]
        return truncated(*fields, self.head.n_tokens, torch.cat([p.tail_mean for p in parts]))


def lm_head(vocabulary: int, d: int, rng: np.random.Generator) -> LMHead:
    """Return the LM head that the module describes, without padding rows."""
    order = np.argsort(np.arange(1, vocabulary + 1) * rng.lognormal(0.0, 1.0, vocabulary))
    rank = np.empty(vocabulary, np.int64)
    rank[order] = np.arange(vocabulary)
    weight = torch.from_numpy(rng.standard_normal((vocabulary, d), dtype=np.float32))
    return LMHead(weight=weight, bias=torch.from_numpy(-np.log(rank + 20.0)).float(), n_tokens=vocabulary)


def vision_states(grid: tuple[int, int], d: int, rng: np.random.Generator) -> torch.Tensor:
    """Return hidden states [rows x columns, d] of one image, of RMS 1."""
    smooth = gaussian_filter(rng.standard_normal((*grid, d)), sigma=(BLUR, BLUR, 0))
    mixed = np.sqrt(0.8) * smooth / smooth.std() + np.sqrt(0.2) * rng.standard_normal(smooth.shape)
    states = torch.from_numpy(mixed.reshape(-1, d)).float()
    return _unit(states)


def sharpness(grid: tuple[int, int], rng: np.random.Generator) -> torch.Tensor:
    """Return a factor [rows x columns, 1] in the range SHARPNESS, smooth over the grid."""
    field = gaussian_filter(rng.standard_normal(grid), sigma=BLUR).reshape(-1, 1)
    low, high = SHARPNESS
    unit = (field - field.min()) / (field.max() - field.min())
    return torch.from_numpy(low + (high - low) * unit).float()


def synthetic(vocabulary: int, grids: list[tuple[int, int]], d: int = 256, seed: int = 0) -> Synthetic:
    """Return a teacher's vision tokens, grid after grid (a grid is a tile or an image)."""
    rng = np.random.default_rng(seed)
    head = lm_head(vocabulary, d, rng)
    tiles = [vision_states(grid, d, rng) * sharpness(grid, rng) for grid in grids]
    return Synthetic(hidden=torch.cat(tiles) * SCALE / d**0.5, head=head)


def answers(teacher: Synthetic, n: int, seed: int = 1) -> Synthetic:
    """Return n tokens of the same teacher that predict answer tokens."""
    rng = np.random.default_rng(seed)
    d = teacher.head.weight.shape[1]
    sharp = torch.from_numpy(rng.uniform(*ANSWER_SHARPNESS, (n, 1))).float()
    return Synthetic(hidden=_unit(_white(n, d, rng)) * sharp * SCALE / d**0.5, head=teacher.head)


def text_states(teacher: Synthetic, n: int, seed: int = 2) -> torch.Tensor:
    """Return hidden states [n, d] of text tokens near a teacher's vision tokens; only their directions matter."""
    rng = np.random.default_rng(seed)
    seen = teacher.hidden[torch.from_numpy(rng.integers(0, len(teacher.hidden), n))]
    return _unit(_unit(seen) + _white(n, seen.shape[1], rng))


def _white(n: int, d: int, rng: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal((n, d), dtype=np.float32))


def _unit(states: torch.Tensor) -> torch.Tensor:
    """Scale each row to RMS 1."""
    return states / states.pow(2).mean(dim=1, keepdim=True).sqrt()
