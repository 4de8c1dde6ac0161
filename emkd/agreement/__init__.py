"""Whether a student can use a cache: one set of checks for the teacher's job, training and inspection.

The modules, in reading order:

    agree       all comparisons, their order, and what is refused
    tokenizer   what ids mean, and how text is cut into tokens
    template    the teacher's chat template becomes the student's
    pictures    which part of an image each side sees, and how it prepares pixels
    text        the tokens of one row: text, answers, positions of images
"""
