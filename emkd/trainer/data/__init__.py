"""What a run trains on.

In reading order:

    run_data   the dataset, the cache, and the samples that both have
    selection  which of the cache's samples the data hold
    samples    a row and its record become a StudentSample; samples become a batch
    order      which sample comes next, on which rank
"""
