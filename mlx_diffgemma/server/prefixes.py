"""Prefixes of earlier requests, encoded: a request that begins with one of them forks it and encodes only the rest."""

from collections import OrderedDict
from collections.abc import Sequence

from ..model.cache import PrefixCache


class Prefixes:
    """The most recently used ones, in at most so many bytes. Buffers that several share are counted once."""

    def __init__(self, most_bytes: int):
        self.most_bytes = most_bytes
        self._kept: OrderedDict[tuple[int, ...], PrefixCache] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of all, free room in their buffers included."""
        buffers = (array for cache in self._kept.values() for array in cache.state)
        return sum({id(array): array.nbytes for array in buffers}.values())

    def longest(self, ids: Sequence[int]) -> PrefixCache | None:
        """A fork of the longest one that the ids go on from, if there is one."""
        whole = tuple(ids)
        fitting = [known for known in self._kept if len(known) < len(whole) and whole[: len(known)] == known]
        if not fitting:
            return None
        best = max(fitting, key=len)
        self._kept.move_to_end(best)
        return self._kept[best].fork()

    def keep(self, ids: Sequence[int], cache: PrefixCache) -> None:
        """Remember that `cache` holds these ids."""
        if self.most_bytes:
            self._kept[tuple(ids)] = cache.fork()
            self._kept.move_to_end(tuple(ids))
            self.shrink(self.most_bytes)

    def shrink(self, most_bytes: int) -> None:
        """Forget the least recently used ones, until the rest has at most so many bytes."""
        while self._kept and self.nbytes > most_bytes:
            self._kept.popitem(last=False)
