"""What happens to a cache: it is created, sealed, extended, verified and repaired.

In reading order:

    create  manifest and tokenizer, only if absent
    seal    the end of a job: totals, and the hash of everything
    extend  more rows for a cache
    verify  reads and checks every byte
    repair  withdraws what is damaged, so that the job writes it again
"""
