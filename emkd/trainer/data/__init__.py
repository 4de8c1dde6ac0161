"""What a run trains on.

In reading order:

    run_data   the dataset, the cache, and the samples that both have
    selection  which of the cache's samples are in the data
    samples    from a row and its record to a StudentSample, and from samples to a batch
    stand_in   a picture for micro-batches without one, for sharded students
    order      which sample comes next, on which rank
"""
