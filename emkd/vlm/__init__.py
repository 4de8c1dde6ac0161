"""A vision-language model as EM-KD sees it. Both teacher and student use this room; Ray is never imported.

Reading order: loading.py (a checkpoint becomes a VisionLanguageModel), identity.py (what a cache records of
it), forward.py (batches, hidden states, logits), states.py (hidden states by what they are for), head.py (the LM head
by itself), affinity.py, pooling.py (students that average their vision tokens; pooled_models.py and pooled_qwen.py are
saved beside them), compose.py (a student of a vision tower and a language model).
"""

from emkd.vlm.loading import VisionLanguageModel, load

__all__ = ["VisionLanguageModel", "load"]
