"""Whether `mlx_diffgemma.tune` chooses by what is faster, on this machine, however busy it is.

    python -m benchmarks.tune [--times 20] [--slow 256]

A random model of 16,384 ids, and two tiles that surely differ: the default, and one of so few ids that a
step is many small products. Each is the default once, `--times` times over: a planted slow candidate must
never be chosen, a planted fast one should be.
"""

import statistics
from argparse import ArgumentParser
from collections.abc import Sequence

from benchmarks import common
from benchmarks.models import config, our_network
from mlx_diffgemma.model.tuning import CPU_TILE, DEFAULT, Tuning
from mlx_diffgemma.pipeline.machine.measuring import by_turns
from mlx_diffgemma.tune import ROUNDS, Seconds, Trial, choose


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--slow", type=int, default=256, help="ids of the slow tile")
    parser.add_argument("--prefix", type=int, default=300)
    asked = parser.parse_args()
    network = our_network(config(64, 1, 16, vocabulary=16_384))

    def measure(tunings: Sequence[Tuning]) -> Seconds:
        return by_turns(network, tunings, asked.prefix, ROUNDS)

    rows = []
    for kind, values in (("slow", (CPU_TILE, asked.slow)), ("fast", (asked.slow, CPU_TILE))):
        trial, taken, ratios = Trial(field="tile", values=values, together=True), 0, []
        for _ in range(asked.times):
            chosen, (default, candidate) = choose(trial, DEFAULT, measure)
            taken += chosen.tile == values[1]
            ratios.append(statistics.median(candidate) / statistics.median(default))
        rows.append(
            [
                f"a {kind} one, {values[1]:,} ids",
                f"{values[0]:,}",
                f"{statistics.median(ratios):.2f}",
                f"{taken} of {asked.times}",
            ]
        )
    common.report(rows, ["candidate", "default's ids", "its step ÷ the default's", "chosen"], "Planted candidates")


if __name__ == "__main__":
    main()
