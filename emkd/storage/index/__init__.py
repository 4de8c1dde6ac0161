"""The index: one row per row of the plan. Its appearance commits a shard.

In reading order:

    table    the rows as an Arrow table and as a Parquet file
    rows     the rows of one shard, made while its records are written
    commit   index/<n>.parquet: the commit of a shard, and the hashes of its objects
    columns  the rows of all shards in a reader's memory, decoded as far as they are needed
    find     from a key or an id to a sample
"""
