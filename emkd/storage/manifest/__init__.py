"""The settings and the plan of a cache, written before its first shard.

In reading order:

    plan       which rows make which shard, of the first dataset and of extensions
    codes      what was asked of codes of hidden states, and the basis that was made
    manifest   the settings that decide every number of a cache
    conflicts  the settings in which a run differs from a cache
    read       the manifest, its extensions and the tokenizer, read from disk and checked
"""
