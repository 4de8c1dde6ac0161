"""What a training step minimizes.

In reading order:

    objective  all losses of a micro-batch, and the total
    terms      which tokens have which loss, against what of the teacher's
    counts     what the sums of an optimizer step are divided by
"""
