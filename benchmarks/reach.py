"""How fast a Mac with too little memory may be when experts are streamed from its disk: a calculation.

    python -m benchmarks.reach                        the released model in q4, on small Macs
    python -m benchmarks.reach --recipe q3 --ssd 1.5 2.8 6.5

Seconds a step = the larger of computing (roofline.py's bound, by the efficiency that published programs reach) and the
streamed bytes ÷ the disk's GB/s: reading is hidden behind computing, or computing behind reading (files/streaming.py).
Assumed: 12 steps a canvas and a commit, a short prompt, room for 4,096 tokens, the memory that macOS lends as it comes.
Published of 256 GB disks: M1 2.75 GB/s, M2 1.46, M4 2.79; larger ones are faster. Nothing here was measured on a Mac.
"""

import argparse
from collections.abc import Sequence

from benchmarks import common
from benchmarks.roofline import RELEASED, Chip, Macs, Model, bound, encode, lent, step
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.packing.recipes import recipe_names
from mlx_diffgemma.pipeline.fitting import Sizes, streamed_layers
from mlx_diffgemma.readers import read_json

MACHINES = (("M1", 8), ("M2", 8), ("M1", 16), ("M2", 16), ("M2 Pro", 16), ("M4", 16), ("M5", 16))
SSD = (1.5, 2.8, 5.0)  # GB/s
STEPS = 12


def sizes(model: Model) -> Sizes:
    """A recipe's weights by layer; recipes pack all layers' experts alike."""
    experts, layers = model.sizes["experts"].nbytes, len(model.config.layers)
    return Sizes(trunk=model.weight_bytes - experts, layers=(experts // layers,) * layers)


def streamed(model: Model, memory: int) -> int:
    """Bytes that every pass reads on a Mac with so many GB."""
    held = sizes(model)
    count = streamed_layers(model.config, held, int(lent(memory)[0]))
    return count * held.layers[0]


def rate(model: Model, chip: Chip, efficiency: float, nbytes: int, ssd: float) -> float:
    """Tokens a second of full canvases, with so many bytes a pass from a disk of `ssd` GB/s."""
    read = nbytes / (ssd * 1e9)
    a_step = max(bound(step(model, prefix=1024), chip) / efficiency, read)
    commit = max(bound(encode(model, model.config.canvas_length, 1024), chip) / efficiency, read)
    return model.config.canvas_length / (STEPS * a_step + commit)


def rows(model: Model, macs: Macs, efficiencies: dict[str, float], ssd: Sequence[float]) -> list[list[object]]:
    """One row a Mac."""
    made: list[list[object]] = []
    for name, memory in MACHINES:
        chip, nbytes = macs.chips[name], streamed(model, memory)
        efficiency = efficiencies[chip.calibration]
        computing = bound(step(model, prefix=1024), chip) / efficiency
        layers = nbytes // sizes(model).layers[0]
        rates = [f"{rate(model, chip, efficiency, nbytes, speed):.1f}" for speed in ssd]
        made.append([f"{name}, {memory} GB", layers, f"{nbytes / 1e9:.1f}", f"{computing:.1f}", *rates])
    return made


def table(recipe: str = "q4", ssd: Sequence[float] = SSD) -> str:
    """As Markdown."""
    config, macs = ModelConfig.from_dict(read_json(RELEASED)), Macs.read()
    models = {name: Model.of(config, name) for name in dict.fromkeys((recipe, *(m.recipe for m in macs.measurements)))}
    speeds = [f"tokens/s at {speed:g} GB/s" for speed in ssd]
    header = [f"Mac, `{recipe}`", "layers streamed", "GB a pass", "s to compute", *speeds]
    return common.table(rows(models[recipe], macs, macs.efficiencies(models), ssd), header)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="q4", help=f"{', '.join(recipe_names())}, or a TOML file")
    parser.add_argument("--ssd", type=float, nargs="+", default=SSD, metavar="GB/s", help="speeds of the disk")
    options = parser.parse_args(arguments)
    print(table(options.recipe, options.ssd))


if __name__ == "__main__":
    main()
