"""Which vision tokens of student and teacher are paired.

In reading order:

    match       the pairs of each sample, by one of three methods
    cost        Manhattan distances of vision logits
    assignment  one-to-one assignments of least total cost
    stopwatch   measures the time that assignments take
"""
