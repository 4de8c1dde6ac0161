"""Time and memory of the cost matrix, and time of the assignment, on synthetic logits, k = 64.

    python -m benchmarks.matching.cost_matrix

cost: from a student's hidden states [Ns, 896] and LM head [151,936, 896] to the matrix [Ns, Nt], float32, one thread,
compared with a dense torch.cdist(p=1) and with a plain gather of Ns·Nt·k logits on the same logits. The time of the LM
head is reported separately: emkd computes only the stored ids, the other two methods compute all ids.

growth: emkd alone with more tokens; memory is the largest resident size of a process beyond inputs and the matrix.

assignment: SciPy on a cost matrix as it is, and on one whose rows are all alike (as before training, when a student
cannot tell its tokens apart), which is close to the worst case; and several images in parallel threads.
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from benchmarks.common.measuring import MIB, in_process, medians, peak, reset_peak, seconds
from benchmarks.common.synthetic_logits import Synthetic, synthetic
from emkd.trainer.matching import cost as cost_module
from emkd.trainer.matching.assignment import solve
from emkd.trainer.matching.cost import assignment_cost
from emkd.vlm.head import LMHead
from emkd.vlm.truncated import TruncatedLogits

V, D, K = 151_936, 896, 64
TILE = (27, 27)
# (student, teacher) tokens of 1, 4 and 5 tiles of 384 pixels, and of 10 teacher tiles beside 729 student tokens
GROWTH = ((144, 729), (576, 2_916), (720, 3_645), (729, 7_290))
IMAGES = 8


def teacher_of(n: int) -> TruncatedLogits:
    """Return n vision tokens in tiles of 729."""
    return synthetic(V, [TILE] * (n // 729)).cut(K)


def student_of(n: int) -> tuple[torch.Tensor, LMHead]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.empty(V, D).normal_(0, D**-0.5, generator=generator)
    return torch.randn(n, D, generator=generator), LMHead(weight=weight, bias=None, n_tokens=V)


def repeats(call: Callable[[], Any], runs: int) -> list[float]:
    return [seconds(call) for _ in range(runs)]


def ours(hidden: torch.Tensor, head: LMHead, teacher: TruncatedLogits) -> dict[str, float]:
    """Return the seconds of emkd's cost matrix: of the LM head, and of the rest."""
    in_head = 0.0
    columns = LMHead.columns

    def timed(self: LMHead, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        nonlocal in_head
        began = time.perf_counter()
        found = columns(self, hidden, ids)
        in_head += time.perf_counter() - began
        return found

    LMHead.columns = timed  # type: ignore[method-assign]
    try:
        whole = seconds(lambda: assignment_cost(hidden, head, teacher))
    finally:
        LMHead.columns = columns  # type: ignore[method-assign]
    return {"lm_head": in_head, "rest": whole - in_head}


def plain_gather(logits: torch.Tensor, teacher: TruncatedLogits) -> torch.Tensor:
    """Return the matrix [Ns, Nt] from gathered logits [rows, Nt, k], a few rows at a time.

    Exact: the distance to the level of the tail is included.
    """
    level = teacher.tail_mean.mean()
    parts = []
    for row in logits.split(4):
        gathered = row[:, teacher.ids]
        stored = ((gathered - teacher.logits).abs() - (gathered - level).abs()).sum(dim=2)
        parts.append(stored + (row - level).abs().sum(dim=1, keepdim=True))
    return torch.cat(parts)


def against_dense(runs: int, dense_runs: int) -> dict[str, Any]:
    """Return interleaved raw repeats and the speedups.

    Raises RuntimeError if the matrices differ by more than one constant for each row.
    """
    teacher, (hidden, head) = teacher_of(729), student_of(144)
    level = teacher.tail_mean.mean()
    t_hat = level.expand(729, V).scatter(1, teacher.ids, teacher.logits)
    found: dict[str, list[Any]] = {"ours": [], "lm_head_all_ids": [], "plain_gather": [], "cdist": []}
    for number in range(runs):
        found["ours"].append(ours(hidden, head, teacher))
        found["lm_head_all_ids"].append(seconds(lambda: next(iter(head.blocks(hidden, V)))))
        (logits,) = head.blocks(hidden, V)
        found["plain_gather"].append(seconds(lambda logits=logits: plain_gather(logits, teacher)))
        if number < dense_runs:
            found["cdist"].append(seconds(lambda logits=logits: torch.cdist(logits, t_hat, p=1)))
    distances = torch.cdist(logits, t_hat, p=1)
    difference = assignment_cost(hidden, head, teacher) - distances
    spread = float((difference - difference.mean(dim=1, keepdim=True)).abs().max() / distances.mean())
    if spread > 5e-5:  # cdist sums 151,936 float32 numbers
        raise RuntimeError(
            f"after removing a constant for each row, the cost matrices differ by {spread} of the mean distance; "
            "expected at most 5e-5"
        )
    rest, dense = median(run["rest"] for run in found["ours"]), median(found["cdist"])
    whole = median(run["rest"] + run["lm_head"] for run in found["ours"])
    return {
        "different_ids": len(teacher.ids.unique()),
        "cost_speedup": dense / rest,
        "plain_gather_speedup": dense / median(found["plain_gather"]),
        "speedup_with_lm_head": (dense + median(found["lm_head_all_ids"])) / whole,
        "largest_difference_of_a_distance": spread,
        "seconds": found,
    }


def grown(n_student: int, n_teacher: int) -> dict[str, float]:
    """Measure one size. Run it in a separate process."""
    torch.set_num_threads(1)
    teacher, (hidden, head) = teacher_of(n_teacher), student_of(n_student)
    assignment_cost(hidden[:1], head, teacher.rows(slice(0, 1)))
    before = reset_peak()
    found = ours(hidden, head, teacher)
    extra = (peak() - before) / MIB - n_student * n_teacher * 4 / MIB
    return {**found, "peak_mib": extra, "different_ids": len(teacher.ids.unique())}


def growth(runs: int) -> list[dict[str, Any]]:
    """Return medians and raw repeats of every size of GROWTH."""
    found = []
    for n_student, n_teacher in GROWTH:
        results = [in_process("benchmarks.matching.cost_matrix", "--size", n_student, n_teacher) for _ in range(runs)]
        found.append({"student": n_student, "teacher": n_teacher, "median": medians(results), "runs": results})
    return found


def pooled(teacher: Synthetic, n_tiles: int, noise: float) -> torch.Tensor:
    """Return a student's tokens [144 x tiles, d]: means of neighbouring teacher tokens, plus noise."""
    grid = teacher.hidden.view(n_tiles, *TILE, -1).permute(0, 3, 1, 2)
    means = torch.nn.functional.adaptive_avg_pool2d(grid, 12).flatten(2).transpose(1, 2).flatten(0, 1)
    return means + noise * means.std() * torch.randn(means.shape, generator=torch.Generator().manual_seed(2))


def assignment(runs: int) -> list[dict[str, Any]]:
    """Return seconds of SciPy by size and kind of costs, and of IMAGES images in threads and one after another."""
    found = []
    for n_tiles in (1, 4):
        made = synthetic(V, [TILE] * n_tiles)
        costs = assignment_cost(pooled(made, n_tiles, 0.5), made.head, made.cut(K))
        alike = costs[:1] + 1e-3 * torch.rand(costs.shape, generator=torch.Generator().manual_seed(3))
        for kind, cost in (("as they are", costs), ("rows alike", alike)):
            one = repeats(lambda cost=cost: solve([cost], "scipy"), runs)
            serial = repeats(lambda cost=cost: [solve([cost], "scipy") for _ in range(IMAGES)], runs)
            threads = repeats(lambda cost=cost: solve([cost] * IMAGES, "scipy"), runs)
            found.append(
                {
                    "size": list(cost.shape), "costs": kind, "one_image": one,
                    f"{IMAGES}_images": serial, f"{IMAGES}_images_in_threads": threads,
                    "thread_speedup": median(serial) / median(threads),
                }
            )  # fmt: skip
    return found


def measure(runs: int = 5, dense_runs: int = 3) -> dict[str, Any]:
    return {
        "against_dense": against_dense(runs, dense_runs),
        "growth": growth(3),
        "assignment": assignment(3),
        "copied_at_a_time": cost_module.COPIED["cpu"],
    }


def show(result: dict[str, Any]) -> str:
    """Return tables in Markdown."""
    dense = result["against_dense"]
    rest = median(run["rest"] for run in dense["seconds"]["ours"])
    head = median(run["lm_head"] for run in dense["seconds"]["ours"])
    lines = [
        "cost matrix 144 x 729, V = 151,936, k = 64 | LM head, ms | rest, ms | cdist / rest",
        "---|---|---|---",
        f"dense cdist | {1e3 * median(dense['seconds']['lm_head_all_ids']):,.0f} "
        f"| {1e3 * median(dense['seconds']['cdist']):,.0f} | 1",
        f"plain gather | {1e3 * median(dense['seconds']['lm_head_all_ids']):,.0f} "
        f"| {1e3 * median(dense['seconds']['plain_gather']):,.0f} | {dense['plain_gather_speedup']:,.0f}",
        f"emkd ({dense['different_ids']:,} ids) | {1e3 * head:,.0f} | {1e3 * rest:,.1f} | {dense['cost_speedup']:,.0f}",
        "",
        "student x teacher tokens | different ids | LM head, ms | rest, ms | peak, MiB",
        "---|---|---|---|---",
    ]
    for one in result["growth"]:
        m = one["median"]
        lines.append(
            f"{one['student']} x {one['teacher']:,} | {m['different_ids']:,.0f} | {1e3 * m['lm_head']:,.0f} "
            f"| {1e3 * m['rest']:,.0f} | {m['peak_mib']:,.0f}"
        )
    threads = f"{IMAGES} images in threads / in turn"
    lines += ["", f"assignment | costs | one image, ms | {threads}", "---|---|---|---"]
    for one in result["assignment"]:
        rows, columns = one["size"]
        lines.append(
            f"{rows} x {columns:,} | {one['costs']} | {1e3 * median(one['one_image']):,.1f} "
            f"| 1 / {one['thread_speedup']:.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, help="measure one size in this process and print JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.size:
        print(json.dumps(grown(*arguments.size)))
    else:
        print(show(measure()))


if __name__ == "__main__":
    main()
