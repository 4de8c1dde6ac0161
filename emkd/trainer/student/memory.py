"""What a student takes of each GPU: arithmetic, which benchmarks/step/shard_memory.py holds to measurements.

Weights, gradients and AdamW's two moments are float32: 16 bytes of a trainable parameter, 4 of a frozen one. Sharded
(student/sharding.py), each of N ranks keeps 1 / N of them. What is not divided:

    gathered     the parameters that belong to no block, and two blocks: the one in use and the next one
    unreduced    gradients of parameters that belong to no block until the end of backward; of one block
    reducing     the copy of the larger of these two that is summed over the ranks
    head         the float32 gradient that the losses keep beside the embedding's, if both are one parameter

Activations depend on the batch: of a layer under bfloat16 with FlashAttention or SDPA about 34 T d bytes for T tokens
of width d (arXiv 2205.05198, equation 2 without its attention matrices), and with activation checkpointing 2 T d for
each layer and one whole layer.
"""

from dataclasses import dataclass, fields
from typing import Any

from emkd.trainer.student.sharding import blocks

FLOAT = 4
MOMENTS = 8


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of parameters.

    trainable:        of all
    others:           that belong to no block (embeddings, LM head, projector, norms);  others_trainable: of these
    block:            of the largest block;  block_trainable: trainable ones of the block that has most
    tied_head:        of the LM head, if it is the embedding, too, and trainable; else 0
    """

    all: int
    trainable: int
    others: int
    others_trainable: int
    block: int
    block_trainable: int
    tied_head: int

    @classmethod
    def of(cls, model: Any) -> "Sizes":
        """Count those of a model, which may be on the device meta, and is not sharded yet."""
        in_blocks = [list(block.parameters()) for _, block in blocks(model)]
        inside = {id(p) for block in in_blocks for p in block}
        others = [p for p in model.parameters() if id(p) not in inside]
        head = model.get_output_embeddings().weight
        tied = head is model.get_input_embeddings().weight and head.requires_grad
        return cls(
            all=_count(model.parameters()),
            trainable=_count(model.parameters(), trainable=True),
            others=_count(others),
            others_trainable=_count(others, trainable=True),
            block=max(map(_count, in_blocks), default=0),
            block_trainable=max((_count(block, trainable=True) for block in in_blocks), default=0),
            tied_head=head.numel() if tied else 0,
        )


def _count(parameters: Any, *, trainable: bool = False) -> int:
    return sum(p.numel() for p in parameters if p.requires_grad or not trainable)


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes on one rank, at the most that a step takes, without activations."""

    parameters: int
    gradients: int
    moments: int
    gathered: int
    unreduced: int
    reducing: int
    head: int

    @property
    def total(self) -> int:
        """The sum of all."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def constant(self) -> int:
        """What does not fall with the number of ranks."""
        return self.gathered + self.unreduced + self.reducing + self.head


def sharded(sizes: Sizes, n_ranks: int) -> StepMemory:
    """Return the memory of a sharded student on each of n_ranks."""
    return StepMemory(
        parameters=FLOAT * sizes.all // n_ranks,
        gradients=FLOAT * sizes.trainable // n_ranks,
        moments=MOMENTS * sizes.trainable // n_ranks,
        gathered=FLOAT * (sizes.others + 2 * sizes.block),
        unreduced=FLOAT * (sizes.others_trainable + sizes.block_trainable),
        reducing=FLOAT * max(sizes.others_trainable, sizes.block_trainable),
        head=FLOAT * sizes.tied_head,
    )


def whole(sizes: Sizes, n_ranks: int) -> StepMemory:
    """Return the memory of a student that is whole on each of n_ranks.

    Several ranks copy gradients into buckets, in which they are summed (DistributedDataParallel).
    """
    return StepMemory(
        parameters=FLOAT * sizes.all,
        gradients=FLOAT * sizes.trainable,
        moments=MOMENTS * sizes.trainable,
        gathered=0,
        unreduced=0,
        reducing=FLOAT * sizes.trainable if n_ranks > 1 else 0,
        head=FLOAT * sizes.tied_head,
    )


def activations(n_tokens: int, width: int, n_layers: int, *, checkpointed: bool) -> int:
    """Return the bytes of the activations of a micro-batch in bfloat16. n_tokens: of all samples, with padding"""
    layer = 34 * n_tokens * width
    return 2 * n_tokens * width * n_layers + layer if checkpointed else layer * n_layers
