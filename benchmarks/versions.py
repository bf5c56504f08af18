"""Two commits, by turns in one run: the parts of a step, and a conversation behind a long prompt. Time and memory.

    python -m benchmarks.versions OLD NEW                    two commits, or . for this working tree
    python -m benchmarks.versions HEAD . --prefix 300 4096

Each side is a process of its own that holds step.py's scaled model (random weights, float32); both do the same part,
one after the other, so that what slows the machine down slows both. The conversation's first turn has `--chat` tokens,
its second a few: what is held before the second turn, and by how much memory's peak rises in it.
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
import json, sys, time
import mlx.core as mx
from mlx_diffgemma import DiffusionGemma, GenerationConfig, load
from benchmarks import step
try:
    from benchmarks import models
except ImportError:  # before it had a file of its own
    models = step

prefixes, chat, hidden, layers = json.loads(sys.argv[1])

def conversation():
    raw = models.config(64, 6, 16, vocabulary=640)
    settings = GenerationConfig(max_tokens=256, max_denoising_steps=2)
    model = DiffusionGemma(models.our_network(raw), load(sys.argv[2]).tokenizer, settings)
    talk = model.chat()
    talk.send("7" * chat, seed=1)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    begun = time.perf_counter()
    reused = talk.send("And now?", seed=2)
    reused = getattr(reused, "statistics", None) or reused.stats
    return {"seconds": time.perf_counter() - begun, "held": before, "memory": mx.get_peak_memory() - before,
            "reused": reused.reused_tokens}

def part(work):
    def run():
        begun = time.perf_counter()
        work()
        return {"seconds": time.perf_counter() - begun, "memory": step.memory(work)}
    return run

works = {}
network = models.our_network(models.config(hidden, layers, 16))
for prefix in prefixes:
    prompt = mx.random.randint(0, 262_144, (1, prefix), key=mx.random.key(2))
    ours = step.Ours(network, prompt, models.keys_and_values(network, 256), commits=2)
    for name, work in ours.parts().items():
        if name != "commit":
            works[f"{name} behind {prefix}"] = part(work)
works[f"second turn behind {chat}"] = conversation
print(json.dumps(list(works)), flush=True)
for line in sys.stdin:
    print(json.dumps(works[line.strip()]()), flush=True)
"""


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--prefix", type=int, nargs="*", default=[300, 4096])
    parser.add_argument("--chat", type=int, default=32_768, help="tokens of the conversation's first turn")
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
    built_in = next((folder / "mlx_diffgemma").rglob("model.safetensors")).parent
    return python(folder, "-c", WORKER, setting, built_in)


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
