"""The decoded shards that were read last: reading shard by shard decodes each shard once."""

from collections import OrderedDict
from collections.abc import Callable, Iterator

from emkd.storage.shards.buffers import Buffers
from emkd.storage.shards.reader import DecodedShard


class ShardWindow:
    """At most `size` decoded shards; the shard that was not used for longest makes room for the next.

    Pickling it to another process leaves the shards out: the other process reads its own. Raises ValueError if `size`
    is less than 1.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"window is {size}; expected at least 1 shard")
        self._size = size
        self._decoded: OrderedDict[int, DecodedShard] = OrderedDict()
        self._buffers = Buffers()

    def __len__(self) -> int:
        return len(self._decoded)

    def __iter__(self) -> Iterator[int]:
        """Iterate over the shards in the window, the one that was used last at the end."""
        return iter(self._decoded)

    def __reduce__(self) -> tuple[type["ShardWindow"], tuple[int]]:
        return ShardWindow, (self._size,)

    def get(self, shard: int, read: Callable[[Buffers], DecodedShard]) -> DecodedShard:
        """Return a shard from the window, or read it into memory of the buffers that `read` is called with."""
        if shard in self._decoded:
            self._decoded.move_to_end(shard)
            return self._decoded[shard]
        while len(self._decoded) >= self._size:  # before reading: it bounds the memory
            _, oldest = self._decoded.popitem(last=False)
            self._buffers.clear()
            oldest.release(self._buffers)
        self._decoded[shard] = read(self._buffers)
        return self._decoded[shard]
