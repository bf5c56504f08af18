"""Prefixes of earlier requests, encoded: a request that begins with one of them forks it and encodes only the rest."""

from collections import OrderedDict
from dataclasses import dataclass

from ..model.cache import PrefixCache
from ..model.network import Network

Key = tuple[int | str, ...]  # a prompt's ids, and what its pictures show


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A prefix, and the network that encoded it: another one cannot go on from it."""

    network: Network
    cache: PrefixCache


class Prefixes:
    """The most recently used ones, in at most so many bytes. Buffers that several share are counted once."""

    def __init__(self, most_bytes: int):
        self.most_bytes = most_bytes
        self._kept: OrderedDict[tuple[int, Key], Kept] = OrderedDict()  # by the network's id

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of all, free room in their buffers included."""
        buffers = (array for kept in self._kept.values() for array in kept.cache.state)
        return sum({id(array): array.nbytes for array in buffers}.values())

    def longest(self, key: Key, network: Network) -> PrefixCache | None:
        """A fork of the longest one that the prompt goes on from, if there is one; another network's is none."""
        own = [known for by, known in self._kept if by == id(network)]
        fitting = [known for known in own if len(known) < len(key) and key[: len(known)] == known]
        if not fitting:
            return None
        best = id(network), max(fitting, key=len)
        self._kept.move_to_end(best)
        return self._kept[best].cache.fork()

    def keep(self, key: Key, network: Network, cache: PrefixCache) -> None:
        """Remember that `cache` holds this much of a prompt, encoded by this network."""
        if self.most_bytes:
            self._kept[id(network), key] = Kept(network=network, cache=cache.fork())
            self._kept.move_to_end((id(network), key))
            self.shrink(self.most_bytes)

    def shrink(self, most_bytes: int) -> None:
        """Forget the least recently used ones, until the rest has at most so many bytes."""
        while self._kept and self.nbytes > most_bytes:
            self._kept.popitem(last=False)
