"""The mathematics of EM-KD's losses (arXiv 2511.21106): pure functions of tensors.

In reading order:

    truncated   the teacher's distributions, cut to their largest logits
    divergence  distances between distributions; VLAD and Sup
    reverse_kl  the paper's divergence, with its gradient in closed form
    chunked     losses of logits through the LM head, some tokens at a time
    weights     how much each loss counts
"""
