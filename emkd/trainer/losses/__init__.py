"""The mathematics of EM-KD's losses (arXiv 2511.21106): pure functions of tensors.

In reading order:

    divergence  what RLD and VSD are sums of, for a teacher cut to its largest logits; VLAD and Sup
    reverse_kl  the paper's divergence, with its gradient in closed form
    chunked     losses of logits through the LM head, some tokens at a time
    weights     the weight of each loss in the total

The teacher's cut distributions themselves are in emkd/vlm/truncated.py.
"""
