"""How much each loss counts in the total: α, β, γ of EM-KD (arXiv 2511.21106)."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Weights:
    """α, β, γ of the paper. α = 1 leaves RLD out, β = 0 VSD, γ = 0 VLAD; all three need no cache at all."""

    alpha: float = 0.5
    beta: float = 0.25
    gamma: float = 25.0

    @property
    def named(self) -> dict[str, float]:
        """Weight of each loss that has one, by the loss's name."""
        weights = {"sup": self.alpha, "rld": 1 - self.alpha, "vsd": self.beta, "vlad": self.gamma}
        return {name: weight for name, weight in weights.items() if weight}

    @property
    def needs_cache(self) -> bool:
        return set(self.named) != {"sup"}

    @property
    def needs_vision(self) -> bool:
        return self.beta != 0 or self.gamma != 0
