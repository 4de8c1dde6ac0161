"""A vision-language model as EM-KD sees it. Teacher and student both use this package; it never imports Ray.

The modules, in reading order:

    loading        a checkpoint becomes a VisionLanguageModel
    identity       what a cache records of a model: hashes, settings, licence
    forward        batches, hidden states, logits
    states         hidden states of one sample by what they are for
    after_head     what a model does to logits after its LM head: a scale, a softcap
    head           the LM head alone: logits of chosen ids
    truncated      a distribution of which the top-k and the tail are known
    codes          hidden states as integers, and logits read from them
    affinity       cosine similarity of text and vision tokens
    parts          vision tower, projector, language model and LM head of any family
    checks         the conditions that a family must meet, checked on the first batch
    tolerance      how much a live teacher may differ from its cache
    pooling        students with fewer vision tokens; `pooled_models` and `pooled_qwen` are saved with them
"""

from emkd.vlm.loading import VisionLanguageModel, load

__all__ = ["VisionLanguageModel", "load"]
