"""From nothing to a model that could generate, ours beside mlx-vlm's: seconds and peak memory, in one run.

    python -m benchmarks.load [--runs 5] [--out FILE]        a random 8-bit pack of about 0.2 GB, tokenizer of full size
    python -m benchmarks.load --model FOLDER                 another pack that both can read

Every load has a process of its own; the two take turns, and a first round, which does not count, brings the files into
the system's cache. Figures are medians, ratios ours ÷ theirs.

    import     until `load` can be called
    model      config, checks and weights, all of them in memory
    tokenizer  tokenizer and chat template; mlx-vlm's processor
    load       the whole call of `load`, which makes both
    process    from start to exit, interpreter and all

transformers imports PyTorch wherever it is installed, as it is for the tests. Neither package needs it, so it is
hidden from both; `--torch` shows it.
"""

import argparse
import json
import statistics
import string
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import count, islice, product
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import common

SCRIPT = """
import json, resource, sys, time

folder, torch = sys.argv[1:]
if torch == "hidden":
    sys.modules["torch"] = None
seconds = {}

def timed(owner, name, part):
    original = getattr(owner, name)

    def wrapper(*arguments, **named):
        begun = time.perf_counter()
        made = original(*arguments, **named)
        seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - begun
        return made

    setattr(owner, name, wrapper)

begun = time.perf_counter()
"""
OURS = """
from mlx_diffgemma import load
seconds["import"] = time.perf_counter() - begun
from mlx_diffgemma.pipeline import loading
timed(loading.weights, "unread", "model")
timed(loading.weights, "evaluate", "model")
timed(loading.Tokenizer, "load", "tokenizer")
"""
THEIRS = """
from mlx_vlm import load
seconds["import"] = time.perf_counter() - begun
from mlx_vlm import utils
timed(utils, "load_model", "model")
timed(utils, "load_processor", "tokenizer")
"""
LOAD = """
begun = time.perf_counter()
model = load(folder)
seconds["load"] = time.perf_counter() - begun
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps(seconds | {"peak_gb": peak / 1e9}))
"""
SIDES = {"ours": OURS, "mlx-vlm": THEIRS}


def measure(side: str, folder: Path, *, torch: bool = False) -> dict[str, float]:
    """One load in a process of its own: seconds of each part, and the most memory it held."""
    script = [sys.executable, "-c", SCRIPT + SIDES[side] + LOAD, str(folder), "shown" if torch else "hidden"]
    begun = time.perf_counter()
    process = subprocess.run(script, cwd=common.ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - begun
    if process.returncode:
        raise SystemExit(f"{side} could not load {folder}:\n{process.stderr}")
    return json.loads(process.stdout.splitlines()[-1]) | {"process": seconds}


def make_pack(folder: Path, *, hidden: int, layers: int, experts: int, vocabulary: int) -> Path:
    """A random pack in q8 with the released names, and a tokenizer of so many tokens."""
    from benchmarks.models import config
    from mlx_diffgemma.files.checkpoint import open_checkpoint
    from mlx_diffgemma.packing.conversion import convert, plan_conversion
    from mlx_diffgemma.packing.recipes import load_recipe
    from tests import small, synthetic

    text = config(hidden, layers, experts, vocabulary)["text_config"]
    source = synthetic.write(folder / "source", synthetic.small_config(**text), fill=synthetic.block_fill())
    small.write_tokenizer(source)
    enlarge(source / "tokenizer.json", vocabulary)
    convert(plan_conversion(open_checkpoint(source), load_recipe("q8")), folder / "pack")
    return folder / "pack"


def enlarge(file: Path, size: int) -> None:
    """Let a tokenizer know so many tokens: every string of small letters, the shortest first, and its merge."""
    tokenizer = json.loads(file.read_text())
    model, letters = tokenizer["model"], string.ascii_lowercase
    longer = ("".join(parts) for length in count(2) for parts in product(letters, repeat=length))
    for token in islice(longer, max(size - len(model["vocab"]), 0)):
        model["vocab"][token] = len(model["vocab"])
        model["merges"].append([token[:-1], token[-1]])
    file.write_text(json.dumps(tokenizer))


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    with TemporaryDirectory() as folder:
        pack = options.model or _made_elsewhere(Path(folder), options)
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        turns = {side: lambda side=side: runs[side].append(measure(side, pack, torch=options.torch)) for side in SIDES}
        common.alternate(turns, options.runs)
        size = sum(file.stat().st_size for file in pack.glob("*.safetensors"))
    medians = {
        side: {name: statistics.median(run[name] for run in every[1:]) for name in every[0]}
        for side, every in runs.items()
    }
    ratios = {name: mine / medians["mlx-vlm"][name] for name, mine in medians["ours"].items()}
    rows = [[name, *(f"{medians[side][name]:.3f}" for side in SIDES), f"{ratios[name]:.2f}"] for name in ratios]
    name = options.model.resolve().name if options.model else "random pack"
    title = f"{name}, {size / 1e9:.2f} GB, {options.runs} runs"
    common.report(rows, ["", *SIDES, "ours ÷ mlx-vlm"], title)
    document = {"benchmark": "load", "model": title, "torch": options.torch, "medians": medians, "ratio": ratios}
    common.finish(common.provenance() | document | {"runs": runs}, options.out)


def _made_elsewhere(folder: Path, options: argparse.Namespace) -> Path:
    """A pack made in another process, whose memory would else count as the loads'."""
    sizes = {name: getattr(options, name) for name in ("hidden", "layers", "experts", "vocabulary")}
    maker = get_context("spawn").Process(target=make_pack, args=(folder,), kwargs=sizes)
    maker.start()
    maker.join()
    if maker.exitcode:
        raise SystemExit("the pack could not be made.")
    return folder / "pack"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a pack with a tokenizer (default: a random one)")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=262_144)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--torch", action="store_true", help="let transformers find PyTorch")
    parser.add_argument("--out", type=Path, help="write the JSON document there as well")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
