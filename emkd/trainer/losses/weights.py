"""The weight of each loss in the total: α, β, γ of EM-KD (arXiv 2511.21106)."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Weights:
    """α, β, γ of the paper. α = 1 turns RLD off, β = 0 VSD, γ = 0 VLAD; with all three off, no cache is needed."""

    alpha: float = 0.5
    beta: float = 0.25
    gamma: float = 25.0

    @property
    def named(self) -> dict[str, float]:
        """The weights that are not 0, by the names sup, rld, vsd and vlad."""
        weights = {"sup": self.alpha, "rld": 1 - self.alpha, "vsd": self.beta, "vlad": self.gamma}
        return {name: weight for name, weight in weights.items() if weight}

    @property
    def needs_cache(self) -> bool:
        """Whether any loss but Sup has a weight."""
        return set(self.named) != {"sup"}

    @property
    def needs_vision(self) -> bool:
        """Whether vision tokens have to be matched."""
        return self.beta != 0 or self.gamma != 0
