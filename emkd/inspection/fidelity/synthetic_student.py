"""A synthetic student at a stated distance from its teacher, to measure a cut without a real student.

Shape legend: n tokens of the teacher, d hidden size
"""

from typing import Literal, get_args

import torch
from torch.nn import functional

Distance = Literal["near", "far"]
DISTANCES: tuple[Distance, ...] = get_args(Distance)
# Standard deviation of the noise, relative to a root mean square of 1 of the states that it is added to.
NOISE: dict[Distance, float] = {"near": 0.25, "far": 1.0}


def synthetic_student(hidden: torch.Tensor, n_tokens: int, distance: Distance, seed: int = 0) -> torch.Tensor:
    """Return float32 hidden states [n_tokens, d] for the teacher's LM head, from the teacher's own [n, d].

    The seed decides the noise. A token is the mean of neighbours in the sequence (of a single token if n_tokens is n),
    scaled to a root mean square of 1, plus white noise of standard deviation 0.25 (near: a student late in training) or
    1 (far: early in training), scaled to the root mean square that its neighbours have on average. Its cosine with the
    mean is then 1 / sqrt(1 + noise²): 0.97 near, 0.71 far.
    """
    states = hidden.float()
    sizes = _size(states)
    means = functional.adaptive_avg_pool1d(torch.cat([states, sizes], dim=1).T[None], n_tokens)[0].T
    generator = torch.Generator().manual_seed(seed)
    noise = NOISE[distance] * torch.randn(n_tokens, hidden.shape[1], generator=generator)
    noisy = means[:, :-1] / _size(means[:, :-1]) + noise.to(hidden.device)
    return noisy / _size(noisy) * means[:, -1:]


def _size(states: torch.Tensor) -> torch.Tensor:
    """Root mean square [n, 1] of each token"""
    return states.pow(2).mean(dim=1, keepdim=True).sqrt()
