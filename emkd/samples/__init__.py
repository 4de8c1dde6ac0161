"""Dataset rows become samples, and samples become token ids. Both teacher and student use this package.

The modules, in reading order:

    dataset       all rows of --data, by number
    sources       the files that the rows are in, one module for each format
    known         what is known of a row: what is read, refused, or listed once
    row           one row, parsed
    conversation  its turns, and which picture goes where
    sample        the conversation and its images, and their key
    image_entry   image entries become bytes
    images        bytes become pixels
    render        the text that a model reads, and which characters of it are answers
    template      what a chat template writes for an image
    process       text and images through a model's processor
    encode        token ids, answer tokens, image spans
    geometry      how an image's tokens lie in two dimensions
"""

from emkd.samples.dataset import Dataset
from emkd.samples.row import ParsedRow
from emkd.samples.sample import Sample, Turn

__all__ = ["Dataset", "ParsedRow", "Sample", "Turn"]
