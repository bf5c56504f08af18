"""How fast Macs with too little memory may be, streaming experts from the disk or sharing the model: a calculation.

    python -m benchmarks.reach                        the released model in q4, on small Macs
    python -m benchmarks.reach --recipe q3 --ssd 1.5 2.8 6.5
    python -m benchmarks.reach --link 3 0.3           two Macs, by a link of so many GB/s and milliseconds a wait

Seconds a step = the larger of computing (roofline.py's bound, by the efficiency that published programs reach) and the
streamed bytes ÷ the disk's GB/s: reading is hidden behind computing, or computing behind reading (files/streaming.py).
Two Macs: half of the computing and a tenth more, then what they send each other, counted (machine/link.py) ÷ GB/s of
the link, and a wait for each exchange; nothing is hidden. Speeds and waits of links are assumed.
Assumed: 12 steps a canvas and a commit, a short prompt, room for 4,096 tokens, the memory that macOS lends as it comes.
Published of 256 GB disks: M1 2.75 GB/s, M2 1.46, M4 2.79; larger ones are faster. Nothing here was measured on a Mac.
"""

import argparse
from collections.abc import Sequence

from benchmarks import common
from benchmarks.roofline import RELEASED, Chip, Macs, Model, bound, encode, lent, step
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.files import layout
from mlx_diffgemma.model.memory import memory_needed
from mlx_diffgemma.model.sharing.share import Share
from mlx_diffgemma.packing import plan
from mlx_diffgemma.packing.recipes import load_recipe, recipe_names
from mlx_diffgemma.pipeline.machine import link
from mlx_diffgemma.pipeline.machine.fitting import Sizes, streamed_layers
from mlx_diffgemma.readers import read_json

MACHINES = (("M1", 8), ("M2", 8), ("M1", 16), ("M2", 16), ("M2 Pro", 16), ("M4", 16), ("M5", 16))
SSD = (1.5, 2.8, 5.0)  # GB/s
STEPS = 12
PAIRS = (("M1", 16), ("M2", 16), ("M2 Pro", 16), ("M4", 16), ("M5", 16), ("M4 Pro", 24), ("M4 Max, 40 cores", 36))
LINKS = {"RDMA": (5.0, 0.2), "Thunderbolt": (2.0, 0.5), "10 GbE": (1.1, 0.5)}  # GB/s, milliseconds an exchange
RDMA = ("M4 Pro", "M4 Max", "M3 Ultra", "M5 Pro", "M5 Max")  # Thunderbolt 5
UNEVEN = 1.1  # what each of two computes, in units of half


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


def held_by_two(model: Model) -> int:
    """Bytes of weights and of a run behind 4,096 tokens, on each of two machines."""
    planned = plan.plan(load_recipe(model.recipe), layout.sources(model.config))
    half = Share(0, 2)
    return memory_needed(half.own(model.config), Sizes.planned(model.config, planned, half).held(0), 4_096)


def pair_seconds(model: Model, computing: float, speed: float, wait: float, *, signal: bool = True) -> float:
    """Seconds of a step that takes one machine so many, by a link of so many GB/s and milliseconds an exchange."""
    rows = model.config.canvas_length
    sent = link.of_pass(model.config, 2, rows, 2, signal=signal)
    if signal:
        sent += link.of_walk(model.config, 2, rows) + link.messages(model.config, rows, 2)
    return UNEVEN * computing / 2 + sent.nbytes / (speed * 1e9) + sent.count * wait / 1e3


def pair_rate(model: Model, chip: Chip, efficiency: float, speed: float, wait: float) -> float:
    """Tokens a second of full canvases on two Macs that hold all of the model together."""
    computing = bound(step(model, prefix=1024), chip) / efficiency
    commit = bound(encode(model, model.config.canvas_length, 1024), chip) / efficiency
    a_step = pair_seconds(model, computing, speed, wait)
    return model.config.canvas_length / (STEPS * a_step + pair_seconds(model, commit, speed, wait, signal=False))


def pairs(recipe: str = "q4", links: dict[str, tuple[float, float]] = LINKS, ssd: float = 2.8) -> str:
    """Two Macs beside one of them, as Markdown."""
    config, macs = ModelConfig.from_dict(read_json(RELEASED)), Macs.read()
    models = {name: Model.of(config, name) for name in dict.fromkeys((recipe, *(m.recipe for m in macs.measurements)))}
    model, efficiencies, made = models[recipe], macs.efficiencies(models), list[list[object]]()
    for name, memory in PAIRS:
        chip = macs.chips[name]
        efficiency, nbytes = efficiencies[chip.calibration], streamed(model, memory)
        alone = rate(model, chip, efficiency, nbytes, ssd)
        rates = [
            f"{pair_rate(model, chip, efficiency, *how):.1f}" if kind != "RDMA" or name.startswith(RDMA) else "–"
            for kind, how in links.items()
        ]
        made.append([f"2 × {name}, {memory} GB", f"{alone:.1f}{' streamed' * bool(nbytes)}", *rates])
    return common.table(made, [f"Macs, `{recipe}`", "one of them", *links])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="q4", help=f"{', '.join(recipe_names())}, or a TOML file")
    parser.add_argument("--ssd", type=float, nargs="+", default=SSD, metavar="GB/s", help="speeds of the disk")
    parser.add_argument("--link", type=float, nargs=2, metavar=("GB/s", "ms"), help="of two Macs")
    options = parser.parse_args(arguments)
    links = {"this link": tuple(options.link)} if options.link else LINKS
    config = ModelConfig.from_dict(read_json(RELEASED))
    print(table(options.recipe, options.ssd), "", pairs(options.recipe, links), sep="\n")
    held = held_by_two(Model.of(config, options.recipe))
    sent = link.of_step(config, 2) + link.messages(config, config.canvas_length, 2)
    told = f"sends {sent.nbytes / 1e6:.0f} MB a step in {sent.count} exchanges"
    print(f"\nEach of two needs {held / 1e9:.1f} GB and {told}.")


if __name__ == "__main__":
    main()
