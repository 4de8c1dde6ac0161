"""One shard: its records become a Zarr group, and come back.

In reading order:

    well_formed  what must hold of a row before it is written
    writer       rows, one after the other, become one Zarr group and its index
    reader       a shard in memory, and records cut from it
    buffers      memory of shards that are no longer needed, reused for the next ones
"""
