"""Which samples of a shard go through the teacher together: a pure function."""

from collections.abc import Sequence


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Positions of samples grouped into batches of at most `budget` padded tokens, similar lengths together.

    A function of the lengths alone: results in bfloat16 depend on the batch, so the same shard always has to be
    cut in the same way. A sample longer than the budget is a batch of its own.
    """
    grouped: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda p: (-lengths[p], p)):
        # Descending: the first of a batch is its longest, which all others are padded to.
        if grouped and (len(grouped[-1]) + 1) * lengths[grouped[-1][0]] <= budget:
            grouped[-1].append(position)
        else:
            grouped.append([position])
    return grouped
