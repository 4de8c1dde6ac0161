"""Reports as plain values.

Reading order: summary (the whole cache), listing (pages of samples), sample (one sample), heatmap (its numbers).
"""
