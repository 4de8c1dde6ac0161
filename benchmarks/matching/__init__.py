"""Matching and losses at the full vocabulary: all.py runs cost_matrix.py, loss_memory.py and fidelity/cut_logits.py."""
