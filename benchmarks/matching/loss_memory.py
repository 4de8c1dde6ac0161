"""Peak memory and time of VSD through the LM head: all logits at once, or in chunks.

    python -m benchmarks.matching.loss_memory

Ns = 2,880 student tokens (20 tiles of 144), V = 151,936, d = 896, k = 64: forward and backward to hidden states and LM
head, in float32. Each variant runs in a separate process; its memory is the largest resident size minus the size
before, when the process holds only the inputs.

plain:   all logits at once, a KL from torch's log_softmax, gather and logsumexp, differentiated by autograd
chunked: emkd.trainer.losses.chunked.head_losses
"""

import argparse
import json
import time
from typing import Any

import torch

from benchmarks.common.measuring import MIB, in_process, medians, peak, reset_peak
from emkd.trainer.losses.chunked import Part, head_losses
from emkd.trainer.losses.reverse_kl import reverse_kl
from emkd.vlm.head import LMHead
from emkd.vlm.truncated import TruncatedLogits, truncated

V, D, K = 151_936, 896, 64


def inputs(n: int) -> tuple[torch.Tensor, torch.Tensor, TruncatedLogits]:
    """Return hidden states [n, d], LM head [V, d] and a teacher. Their values change neither memory nor time."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, D, generator=generator)
    weight = torch.empty(V, D).normal_(0, D**-0.5, generator=generator)
    ids = (torch.randint(V, (n, 1), generator=generator) + 997 * torch.arange(K)) % V  # different within a row
    logits = 10 + torch.randn(n, K, generator=generator).sort(dim=1, descending=True).values
    return hidden, weight, truncated(ids, logits, torch.full((n,), 12.0), V, torch.zeros(n))


def plain(hidden: torch.Tensor, weight: torch.Tensor, teacher: TruncatedLogits) -> torch.Tensor:
    """Return the sum of the reverse KL with a uniform tail, written directly from the formula."""
    log_s = torch.nn.functional.linear(hidden, weight).log_softmax(dim=1)
    log_z = torch.logaddexp(teacher.logits.logsumexp(dim=1), teacher.tail_logsumexp)
    tail_level = teacher.tail_logsumexp - log_z - torch.tensor(float(V - K)).log()
    log_t = tail_level[:, None].expand(-1, V).scatter(1, teacher.ids, teacher.logits - log_z[:, None])
    return (log_s.exp() * (log_s - log_t)).sum()


def chunked(hidden: torch.Tensor, weight: torch.Tensor, teacher: TruncatedLogits) -> torch.Tensor:
    """Return the same sum as emkd computes it."""

    def vsd(logits: torch.Tensor, rows: slice) -> dict[str, torch.Tensor]:
        return {"vsd": reverse_kl(logits, teacher.rows(rows), "uniform").sum()}

    head = LMHead(weight=weight, bias=None, n_tokens=V)
    return head_losses(head, [Part(hidden=hidden, losses=vsd, weights={"vsd": 1.0})])[0]


VARIANTS = {"plain": plain, "chunked": chunked}


def run_here(variant: str, n: int) -> dict[str, float]:
    """Measure one variant in this process."""
    torch.set_num_threads(1)
    hidden, weight, teacher = inputs(n)
    VARIANTS[variant](hidden[:1], weight, teacher.rows(slice(0, 1)))  # allocates what libraries allocate once
    before = reset_peak()
    hidden.requires_grad_()
    weight.requires_grad_()
    started = time.perf_counter()
    loss = VARIANTS[variant](hidden, weight, teacher)
    loss.backward()
    seconds = time.perf_counter() - started
    norm = float(torch.stack([hidden.grad.norm(), weight.grad.norm()]).norm())  # type: ignore[union-attr]
    outputs = sum(tensor.numel() * 4 for tensor in (hidden, weight))
    extra = peak() - before
    return {
        "peak_mib": extra / MIB,
        "beyond_gradients_mib": (extra - outputs) / MIB,
        "seconds": seconds,
        "loss": float(loss.detach()),
        "gradient_norm": norm,
    }


def measure(n: int = 2_880, runs: int = 3) -> dict[str, Any]:
    """Return raw repeats and medians by variant, and `peak_memory_ratio`: chunked / plain, gradients included.

    Raises RuntimeError if loss or gradient of the two variants differ.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(runs):
        for name in VARIANTS:
            found[name].append(in_process("benchmarks.matching.loss_memory", "--variant", name, "--tokens", n))
    for key, allowed in (("loss", 1e-5), ("gradient_norm", 1e-5)):
        one, other = (found[name][0][key] for name in VARIANTS)
        if abs(one - other) > allowed * abs(one):
            raise RuntimeError(f"{key}: plain gives {one}, chunked {other}; expected the same within {allowed:.0e}")
    middle = {name: medians(repeats) for name, repeats in found.items()}
    return {
        "tokens": n,
        "median": middle,
        "peak_memory_ratio": middle["chunked"]["peak_mib"] / middle["plain"]["peak_mib"],
        "time_ratio": middle["chunked"]["seconds"] / middle["plain"]["seconds"],
        "runs": found,
    }


def show(result: dict[str, Any]) -> str:
    """Return a table in Markdown."""
    lines = [
        f"VSD of {result['tokens']:,} tokens | peak, MiB | beyond the gradients | seconds",
        "---|---|---|---",
    ]
    for name, one in result["median"].items():
        lines.append(f"{name} | {one['peak_mib']:,.0f} | {one['beyond_gradients_mib']:,.0f} | {one['seconds']:.1f}")
    lines.append(f"chunked / plain | {result['peak_memory_ratio']:.3f} | | {result['time_ratio']:.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=list(VARIANTS), help="measure one in this process and print JSON")
    parser.add_argument("--tokens", type=int, default=2_880)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(run_here(arguments.variant, arguments.tokens)))
    else:
        print(show(measure(arguments.tokens, arguments.runs)))


if __name__ == "__main__":
    main()
