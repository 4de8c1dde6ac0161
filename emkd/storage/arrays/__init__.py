"""The arrays of a shard: how each kind of array is laid out, encoded and decoded.

In reading order:

    layout         name, shape, type and chunks of one array
    kind           the contract of a kind of array: encode and decode
    frames         codes of hidden states as bytes
    ids, logits, tails, affinity, positions, codes
                   one module per kind, each with all its forms
    record_arrays  the arrays of a whole record
    chunks         chunks as bytes, and Zarr metadata
"""
