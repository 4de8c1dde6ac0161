"""Reports on a terminal, without torch.

Reading order: report (the whole cache, or its damage), listing (a page of samples), sample (one sample),
comparison (with a live teacher), choices (settings of a cache that is to be made).
"""
