"""Which rows of a shard go through the teacher together: a pure function."""

from collections.abc import Sequence


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group rows into batches of at most `budget` padded tokens, rows of similar lengths together.

    lengths: tokens of each row.  Returns the indices of the rows of each batch

    The batches depend on the lengths alone: results in bfloat16 depend on the batch, so the same shard must always be
    batched in the same way. A row longer than the budget is a batch of its own.
    """
    grouped: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # Lengths descend: the first row of a batch is the longest, and the others are padded to it.
        if grouped and (len(grouped[-1]) + 1) * lengths[grouped[-1][0]] <= budget:
            grouped[-1].append(index)
        else:
            grouped.append([index])
    return grouped
