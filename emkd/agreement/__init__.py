"""Can this student use this cache? The teacher's job, training and inspection ask here, and get the same answer.

The modules, in reading order:

    agree       the whole list: what is compared, in which order, and what is refused
    tokenizer   what ids mean, and how text is cut into tokens
    template    the teacher's chat template becomes the student's
    pictures    which part of an image each side sees, and how it prepares pixels
    text        the tokens of one row: text, answers, positions of images
"""
