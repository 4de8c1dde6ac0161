"""What a model does to its logits after its LM head: a scale, a softcap, or nothing.

    z = W h + b  --AfterHead-->  t = cap * tanh(scale * z / cap)

A config's numbers do not say whether a class uses them (a LLaVA-NeXT around a Granite ignores the Granite's
`logits_scaling`), so a trial decides (`find_after_head` in checks.py). Its result is kept on the model, where
everything that computes logits finds it.

Shape legend: n tokens, V ids
"""

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from emkd.errors import ModelError

CAPS = ("final_logit_softcapping",)
FACTORS, DIVISORS = ("logit_scale", "output_multiplier", "logits_scaling"), ("logits_scaling",)
# Of the model: copies of it have it, too, and nothing saves it.
ATTRIBUTE = "_emkd_after_head"


@dataclass(frozen=True, kw_only=True)
class AfterHead:
    """scale: multiplies logits;  cap: the largest absolute value that a softcap then lets through, None for none"""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return what the model makes of its head's logits, in their dtype and of their shape; has gradients."""
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def backward(self, gradient: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Return the gradient for the head's logits from that for the logits `after`, of the same shape."""
        if self.cap is not None:
            gradient = gradient * (1 - (after / self.cap).square())
        return gradient if self.scale == 1 else gradient * self.scale

    def __str__(self) -> str:
        parts = [f"times {self.scale:g}"] if self.scale != 1 else []
        parts += [f"a softcap of {self.cap:g}"] if self.cap is not None else []
        return " and ".join(parts) or "nothing"


NOTHING = AfterHead()


def candidates(config: Any) -> tuple[AfterHead, ...]:
    """Return what a model with this config may do after its head; nothing comes first."""
    configs = (config, config.get_text_config())

    def named(names: tuple[str, ...]) -> list[float]:
        values = [getattr(each, name, None) for name in names for each in configs]
        return [float(v) for v in values if isinstance(v, (int, float)) and math.isfinite(v) and v > 0]

    scales = [1.0, *named(FACTORS), *(1 / value for value in named(DIVISORS))]
    found = (AfterHead(scale=scale, cap=cap) for cap, scale in product([None, *named(CAPS)], scales))
    return tuple(dict.fromkeys(found))


def keep(model: Any, found: AfterHead) -> None:
    """Keep what a model does after its head, for `after_head`."""
    setattr(model, ATTRIBUTE, found)


def after_head(model: Any) -> AfterHead:
    """Return what was kept for this model; nothing if its config names nothing else.

    Raises ModelError if the config names something and nobody has tried yet.
    """
    found: AfterHead | None = getattr(model, ATTRIBUTE, None)
    if found is None and len(candidates(model.config)) > 1:
        raise ModelError(
            f"{type(model).__name__}: its config has a scale or a softcap of logits, and nobody has found out yet "
            "whether the model uses it; check the model on a sample first (emkd.vlm.checks)"
        )
    return NOTHING if found is None else found
