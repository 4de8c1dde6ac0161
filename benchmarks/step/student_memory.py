"""The table of docs/training.md: what a student takes of each of 1, 4 or 8 GPUs, by arithmetic alone.

    python -m benchmarks.step.student_memory

Students are a SigLIP-so400m, a projector and a Qwen2 of 0.6, 2 or 8 billion parameters together, all trained, a
micro-batch of 8 samples of 512 tokens, bf16 with activation checkpointing. emkd/trainer/student/memory.py has the
formulas; shard_memory.py measures them.
"""

from collections.abc import Iterator

from benchmarks.common.random_llava import SO400M, Shape, Text, meta_model
from emkd.trainer.losses.chunked import CHUNK
from emkd.trainer.student.memory import FLOAT, Sizes, activations, sharded, whole

V = 151_936
STUDENTS = {
    "0.6B": Text(hidden=512, layers=28, heads=8, key_value_heads=2, intermediate=2816, rows=V, tied=True),
    "2B": Text(hidden=1536, layers=28, heads=12, key_value_heads=2, intermediate=8960, rows=V, tied=True),
    "8B": Text(hidden=4096, layers=36, heads=32, key_value_heads=8, intermediate=12_288, rows=V),
}
GPUS = (1, 4, 8)
N_TOKENS = 8 * 512
COLUMNS = 384  # of the codes' basis, of which the projected LM head is kept, [V, COLUMNS] float32
CHUNKS = 4  # of logits that a loss holds at a time: logits, log-probabilities, the teacher's, the gradient


def rows() -> Iterator[str]:
    """Yield the rows of the table: GB of a GPU."""
    for name, text in STUDENTS.items():
        sizes = Sizes.of(meta_model(Shape(text=text, tower=SO400M, n_tokens=V)))
        for n_gpus in GPUS:
            step = whole(sizes, 1) if n_gpus == 1 else sharded(sizes, n_gpus)
            divided = step.parameters + step.gradients + step.moments
            active = activations(N_TOKENS, text.hidden, text.layers, checkpointed=True)
            head = FLOAT * (CHUNKS * CHUNK + V * COLUMNS)
            cells = [divided, step.constant, active, head, divided + step.constant + active + head]
            numbers = " | ".join(f"{n_bytes / 1e9:.1f}" for n_bytes in cells)
            yield f"| {name} ({sizes.all / 1e9:.2f}B) | {n_gpus} | {numbers} |"


if __name__ == "__main__":
    print("\n".join(rows()))
