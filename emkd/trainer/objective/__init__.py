"""What a training step minimizes.

In reading order:

    objective      all losses of a micro-batch, and their weighted total
    hidden_states  the student's forward pass
    terms          which tokens have which loss, and what of the teacher's it compares with
    counts         what the sums of an optimizer step are divided by
"""
