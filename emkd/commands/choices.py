"""The values that options with a few choices take, as `--help` and completion show them.

The packages that use them define them, too, and are slow to import; a test compares the two.
"""

from typing import Literal

AffinityForm = Literal["stored", "codes"]
LogitsPrecision = Literal["bfloat16", "float16", "float32", "step0.1", "step0.2"]
AffinityPrecision = Literal["int8", "float16", "float32"]
Compression = Literal["zstd", "lz4"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

Divergence = Literal["reverse_kl", "forward_kl", "jsd"]
Tail = Literal["auto", "codes", "uniform", "bucket"]
Matching = Literal["logits", "pooled", "random"]
Solver = Literal["scipy", "cuda"]

# The parts of a model that a recipe names (emkd.vlm.parts).
PARTS = ("vision_tower", "projector", "language_model", "lm_head")
