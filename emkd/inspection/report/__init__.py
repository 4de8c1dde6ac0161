"""Reports as plain values. Reading order: summary (the whole cache), sample (one sample), heatmap (its numbers)."""
