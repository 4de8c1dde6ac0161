"""What a cut to k logits changes (cut_logits.py), and the tolerance of `--against-teacher` (tolerance.py)."""
