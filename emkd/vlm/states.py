"""The last hidden states of one sample by what they are for, the same for teacher and student.

Shape legend: T positions of a sample, d hidden size, L text tokens, N vision tokens, A answer tokens
"""

from dataclasses import dataclass

import torch

from emkd.samples.encode import Encoded


@dataclass(frozen=True, kw_only=True)
class States:
    """Hidden states of a sample.

    vision: [N, d];  text: [L, d];  predicting: [A, d] at the positions that predict answer tokens
    """

    vision: torch.Tensor
    text: torch.Tensor
    predicting: torch.Tensor

    @classmethod
    def of(cls, encoded: Encoded, hidden: torch.Tensor) -> "States":
        """Pick the states out of `hidden`: [T, d] of the sample, padding included."""
        return cls(
            vision=hidden[: encoded.n_tokens][encoded.vision_mask.to(hidden.device)],
            text=hidden[encoded.text_positions.to(hidden.device)],
            predicting=hidden[encoded.predicting_positions.to(hidden.device)],
        )
