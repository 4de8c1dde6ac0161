"""Write the records of one shard as a Zarr group, and read them.

In reading order:

    well_formed  checks of a row before it is written
    writer       write rows as one Zarr group and its index
    reader       a decoded shard in memory, and its records
    buffers      memory that the next shard reuses
    window       the decoded shards that were read last
"""
