"""What a cache says of itself before it holds any number.

In reading order:

    plan      which rows make which shard, of the first dataset and of extensions
    manifest  the settings that decide every number of a cache, and who may share one
    read      the manifest and its extensions, read from disk and checked
"""
