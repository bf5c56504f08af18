"""What one machine computes where several share a model: some output rows of every matrix.

Pieces are gathered, never summed, so that no sum changes its order: the result is one machine's, to the bit.
"""

import mlx.core as mx


class Share:
    """A machine that is alone: its rows are all rows."""

    rank = 0
    size = 1

    def gather(self, *pieces: mx.array) -> list[mx.array]:
        """Last axes that every machine has some of → whole ones; all in one exchange."""
        return list(pieces)


ALONE = Share()
