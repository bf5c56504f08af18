"""From typing a command to the first look at a canvas of the built-in model, two commits by turns.

    python -m benchmarks.startup OLD NEW [--runs 7]          two commits, or . for this working tree

Processor seconds and seconds of whole processes that end at the first step; medians. The prompt is a Sudoku.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path
from statistics import median

from benchmarks import common
from benchmarks.bits import tree

WORKER = """
import os, sys
import mlx_diffgemma

model = mlx_diffgemma.load(sys.argv[2])
for event in model.stream(sys.argv[1], seed=1):
    if type(event).__name__ == "Denoised":
        event.best.tolist()
        os._exit(0)
os._exit(1)
"""


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--runs", type=int, default=7)
    asked = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as temporary,
        tree(asked.old, Path(temporary) / "old") as old,
        tree(asked.new, Path(temporary) / "new") as new,
    ):
        taken = [[measured(side) for side in (old, new)] for _ in range(asked.runs + 1)][1:]
    rows = []
    for number, name in enumerate(("processor seconds", "seconds")):
        before, after = (median(run[side][number] for run in taken) for side in (0, 1))
        rows.append([name, f"{before:.2f}", f"{after:.2f}", f"{after / before:.2f}"])
    common.report(rows, ["until the first step", "old", "new", "ratio"], f"{asked.old} → {asked.new}")


def measured(side: Path) -> tuple[float, float]:
    """Processor seconds and seconds of one process."""
    built_in = next((side / "mlx_diffgemma").rglob("model.safetensors")).parent
    command = [sys.executable, "-P", "-c", WORKER, common.PROMPTS[-1], str(built_in)]
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=side, env=os.environ | {"PYTHONPATH": str(side)}, check=True)
    taken, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, taken


if __name__ == "__main__":
    main()
