"""Conversion at full size, ours beside mlx-vlm's, in one run: seconds, GB/s, processor seconds, peak memory.

    python -m benchmarks.convert FOLDER [--content sparse|random] [--layers 30] [--out FILE]

The checkpoint has the released layout: 51.6 GB in 11 shards; `sparse` holds zeros and takes no disk, `random` takes
all of it (fewer layers take less; mlx-vlm wants multiples of 6). Both make the 4-bit pack with an 8-bit trunk, one
after the other; each pack is deleted before the next is made. The checkpoint has no tokenizer, so mlx-vlm is handed
an empty processor. FOLDER needs room for the checkpoint and one pack. `processor_s` is the time that all cores
together spent on it.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks import common
from tests import synthetic

OURS = """
import sys
from mlx_diffgemma.convert import main
main(["--hf-path", sys.argv[1], "--mlx-path", sys.argv[2], "--recipe", "q4"])
"""
THEIRS = """
import sys
from importlib import import_module
from types import SimpleNamespace
from mlx_vlm import utils

def fetch(path, lazy, **options):
    processor = SimpleNamespace(save_pretrained=lambda folder: None)
    return utils.load_model(path, lazy), utils.load_config(path), processor

convert = import_module("mlx_vlm.convert")  # the package has a function of this name
convert.fetch_from_hub = fetch
convert.create_model_card = lambda *arguments: None
convert.convert(sys.argv[1], sys.argv[2], quantize=True, q_bits=4, q_group_size=64)
"""


def make_source(folder: Path, content: str, layers: int) -> None:
    """A checkpoint of the released widths with so many layers."""
    config = synthetic.published("released/config.json")
    text = config["text_config"]
    text |= {"num_hidden_layers": layers, "layer_types": text["layer_types"][:layers]}
    synthetic.write(folder, config, fill=synthetic.block_fill() if content == "random" else None)


def measure(script: str, source: Path, target: Path) -> dict[str, float]:
    """One conversion in a process of its own; the pack is deleted."""
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    os.sync()
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", script, source, target], cwd=common.ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        sys.exit(f"a converter failed with status {status}")
    made = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    shutil.rmtree(target)
    return {
        "seconds": seconds,
        "processor_s": usage.ru_utime + usage.ru_stime,
        "gb_per_s": size / seconds / 1e9,
        "peak_gb": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9,
        "pack_gb": made / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--content", choices=["sparse", "random"], default="sparse")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    source = args.folder / "source"
    # In a process of its own: a converter's peak would begin at the memory of the process that starts it.
    maker = get_context("spawn").Process(target=make_source, args=(source, args.content, args.layers))
    maker.start()
    maker.join()
    try:
        load_before = os.getloadavg()[0]
        results = {
            name: measure(script, source, args.folder / "pack")
            for name, script in (("mlx-diffgemma", OURS), ("mlx-vlm", THEIRS))
        }
    finally:
        shutil.rmtree(source)
    ours, theirs = results["mlx-diffgemma"], results["mlx-vlm"]
    rows = [[name, *(f"{value:.2f}" for value in figures.values())] for name, figures in results.items()]
    rows.append(["ours ÷ theirs", *(f"{ours[key] / theirs[key]:.2f}" for key in ours)])
    common.report(rows, ["", *ours], f"q4 from {args.content} content, {args.layers} layers")
    document: dict[str, Any] = {"benchmark": "convert", "content": args.content, "layers": args.layers}
    common.finish(document | {"load_before": load_before, "results": results} | common.provenance(), args.out)


if __name__ == "__main__":
    main()
