"""Two commits, by turns in one run: the parts of a step, and a conversation behind a long prompt. Time and memory.

    python -m benchmarks.versions OLD NEW                    two commits, or . for this working tree
    python -m benchmarks.versions HEAD . --prefix 300 4096

Each side is a process of its own that holds step.py's scaled model (random weights, float32); both do the same part,
one after the other, so that what slows the machine down slows both. The turn is one of a conversation behind `--chat`
tokens: a fork (before there were forks, a snapshot) of the prefix, a question, one look at a canvas, its commit.
"""

import json
import subprocess
import tempfile
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.bits import python, tree

WORKER = """
import inspect, json, sys, time
import mlx.core as mx
from benchmarks import step
try:
    from benchmarks import models
except ImportError:  # before it had a file of its own
    models = step

prefixes, chat, hidden, layers = json.loads(sys.argv[1])

def conversation():
    # A turn behind a prefix that the next one goes back to: a question, one look at a canvas, its commit.
    network = models.our_network(models.config(64, 6, 16, vocabulary=640))
    cache = network.make_cache()
    cache.reserve(chat + 600)
    for layer, (keys, values) in zip(cache.layers, models.keys_and_values(network, chat), strict=True):
        layer.append(keys, values)
    cache.advance(chat)
    mx.eval(cache.state)
    canvas = mx.zeros((1, 256), mx.int32)

    def turn():
        live = cache.fork() if hasattr(cache, "fork") else cache
        before = None if live is not cache else cache.snapshot()
        network.encode(canvas[:, :20], live)
        mx.eval(live.state)
        mx.eval(network.denoise(canvas, live, None))
        network.encode(canvas, live)
        mx.eval(live.state)
        if before is not None:
            cache.restore(before)

    turn()
    begun = time.perf_counter()
    turn()
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "held": mx.get_active_memory(), "memory": step.memory(turn)}

def part(work):
    def run():
        begun = time.perf_counter()
        work()
        return {"seconds": time.perf_counter() - begun, "memory": step.memory(work)}
    return run

works = {}
network = models.our_network(models.config(hidden, layers, 16))
for prefix in prefixes:
    behind = mx.random.randint(0, 262_144, (1, prefix), key=mx.random.key(2))
    if "prefix" in inspect.signature(step.Ours).parameters:  # before, it was read
        behind = models.keys_and_values(network, prefix)
    ours = step.Ours(network, behind, models.keys_and_values(network, 256), commits=2)
    for name, work in ours.parts().items():
        if name != "commit":
            works[f"{name} behind {prefix}"] = part(work)
works[f"a turn behind {chat}"] = conversation
print(json.dumps(list(works)), flush=True)
for line in sys.stdin:
    print(json.dumps(works[line.strip()]()), flush=True)
"""


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--prefix", type=int, nargs="*", default=[300, 4096])
    parser.add_argument("--chat", type=int, default=32_768, help="tokens of the prefix behind which a turn is measured")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as temporary,
        tree(asked.old, Path(temporary) / "old") as old,
        tree(asked.new, Path(temporary) / "new") as new,
    ):
        setting = json.dumps([asked.prefix, asked.chat, asked.hidden, asked.layers])
        sides = [_start(side, setting) for side in (old, new)]
        names, _ = (json.loads(_answer(side)) for side in sides)
        found = {name: _by_turns(sides, name, 1 if "turn" in name else asked.runs) for name in names}
        for side in sides:
            side.communicate()
    rows = [_row(name, *pair) for name, pair in found.items()]
    common.report(rows, ["part", "s old", "s new", "ratio", "MB old", "MB new", "ratio"], f"{asked.old} → {asked.new}")
    common.finish(common.provenance() | {"parts": found}, asked.json)


def _start(folder: Path, setting: str) -> "subprocess.Popen[str]":
    return python(folder, "-c", WORKER, setting)


def _answer(side: "subprocess.Popen[str]") -> str:
    assert side.stdout is not None
    line = side.stdout.readline()
    if not line.startswith(("[", "{")):
        raise SystemExit(f"{side.args} said:\n{line}{side.stdout.read()}")
    return line


def _by_turns(sides: "list[subprocess.Popen[str]]", name: str, runs: int) -> list[dict[str, Any]]:
    """Medians of both sides; the first round of several does not count."""
    measured: list[list[dict[str, Any]]] = [[], []]
    for _ in range(runs + (runs > 1)):
        for side, mine in zip(sides, measured, strict=True):
            assert side.stdin is not None
            print(name, file=side.stdin, flush=True)
            mine.append(json.loads(_answer(side)))
    counted = [mine[(runs > 1) :] for mine in measured]
    return [{key: float(np.median([one[key] for one in mine])) for key in mine[0]} for mine in counted]


def _row(name: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [
        name,
        f"{old['seconds']:.3f}",
        f"{new['seconds']:.3f}",
        f"{new['seconds'] / old['seconds']:.2f}",
        f"{old['memory'] / 1e6:.0f}",
        f"{new['memory'] / 1e6:.0f}",
        f"{new['memory'] / old['memory']:.2f}" if old["memory"] else "–",
    ]


if __name__ == "__main__":
    main()
