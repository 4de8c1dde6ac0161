"""Create, seal, extend, verify and repair a cache.

In reading order:

    create  write manifest and tokenizer, only if absent
    seal    write totals and the hash of everything, at the end of a job
    extend  plan more rows for a cache
    verify  read and check every byte
    repair  delete damaged objects, so that the job writes them again
"""
