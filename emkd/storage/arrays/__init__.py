"""The arrays of a shard: how each kind of number is laid out, encoded and decoded."""
