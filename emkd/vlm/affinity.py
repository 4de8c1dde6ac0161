"""Vision-language affinity: how similar each text token is to each vision token (EM-KD, arXiv 2511.21106)."""

import torch


def affinity(text_hidden: torch.Tensor, vision_hidden: torch.Tensor) -> torch.Tensor:
    """Return the cosine similarities [L, N] of text [L, d] and vision [N, d] hidden states, in float32.

    Also under autocast.
    """
    with torch.autocast(text_hidden.device.type, enabled=False):
        text = torch.nn.functional.normalize(text_hidden.float(), dim=-1)
        vision = torch.nn.functional.normalize(vision_hidden.float(), dim=-1)
        return text @ vision.T
