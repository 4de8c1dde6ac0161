"""The index: one row per row of the plan. Its appearance commits a shard.

In reading order:

    table        the rows as an Arrow table and as a Parquet file
    parquet_sizes  what a Parquet file takes in memory, from its headers
    rows         the rows of one shard, built while its records are written
    commit       index/<n>.parquet: the commit of a shard, and the hashes of its objects
    check_rows   what the rows of a shard say fits together
    committed    the indexes of several committed shards, and their totals
    columns      the rows of all shards in a reader's memory, decoded on first use
    find         from a key or an id to a sample
    sample_info  one sample as its index describes it
"""
