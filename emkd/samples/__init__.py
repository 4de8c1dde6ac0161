"""Dataset rows become samples, samples become token ids. Both teacher and student use this room.

Reading order: dataset.py (all rows), sources.py (the files that they are in), sample.py (Sample and its key), images.py
(bytes and pixels), render.py (the text that a model reads), encode.py (token ids, answer tokens, image spans),
geometry.py (how an image's tokens lie in two dimensions), agreement.py (whether teacher and student read the same).
"""

from emkd.samples.dataset import Dataset
from emkd.samples.sample import Sample, Turn

__all__ = ["Dataset", "Sample", "Turn"]
