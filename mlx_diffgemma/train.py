"""`mlx_diffgemma.train`: fine-tune with LoRA or in full, or train a small model from scratch."""

import json
import time
import tomllib
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli import Option, command
from .errors import ConfigError, MemoryLimitError
from .files.shipped import BUILT_IN

if TYPE_CHECKING:
    from .files.adapters import Lora
    from .model.network import Network
    from .training.data import Example
    from .training.trainer import Evaluated, Trained

TARGETS = {"attention": "ATTENTION", "dense": "DENSE", "experts": "EXPERTS"}
LORA = ("rank", "scale", "targets", "fuse", "peft")  # options that mean nothing without an adapter
OWN = {"model", "from_scratch", "data", "output", "full", "exact_match", *LORA}  # the others are Settings'

_lora_option = partial(click.option, cls=Option, section="LoRA")
_further = partial(click.option, cls=Option, section="Training")
_watching = partial(click.option, cls=Option, section="Watching it")


@command("train")
@click.option("--model", metavar="PATH|REPO", help="What to fine-tune.  [default: the built-in one]")
@click.option("--data", metavar="PATH|REPO", help="Folder or Hub dataset with train.jsonl.")
@click.option("--output", "--adapter-path", metavar="DIR", help="Where the result goes.  [default: adapters]")
@click.option("--steps", "--iters", type=int, metavar="N", help="Optimizer steps.  [default: 800]")
@click.option("--batch-size", type=int, metavar="N", help="Examples per gradient.  [default: 8]")
@click.option("--learning-rate", type=float, metavar="X", help="At the end of the warmup.  [default: 1.5e-4]")
@click.option(
    "--max-length", "--max-seq-length", metavar="N", type=int, help="Leave out longer examples.  [default: 4096]"
)
@click.option("--full", is_flag=True, default=None, help="Train every weight, no adapter.")
@click.option("--config", metavar="FILE.toml", help="The same options in a file.")
@_lora_option("--rank", type=click.IntRange(1), help="LoRA rank.  [default: 16]")
@_lora_option("--scale", type=float, help="LoRA scale, alpha / rank.  [default: 2]")
@_lora_option("--targets", help="What LoRA adapts: attention, dense, experts.  [default: attention,dense]")
@_lora_option("--fuse", is_flag=True, default=None, help="Also write the model with the adapter merged.")
@_lora_option("--peft", is_flag=True, default=None, help="Also write it in PEFT's format, for transformers.")
@_further("--from-scratch", metavar="FOLDER", help="Random weights; FOLDER has config and tokenizer.")
@_further("--accumulate", "--grad-accumulation-steps", type=int, help="Gradients per step.  [default: 1]")
@_further("--warmup", type=int, help="Steps until the learning rate is reached.  [default: 25]")
@_further("--optimizer", type=click.Choice(["adamw", "muon"]), help="[default: adamw]")
@_further(
    "--checkpoint-layers",
    "--grad-checkpoint",
    is_flag=True,
    default=None,
    help="Less memory, more time.  [default: if it must]",
)
@_further("--train-router", is_flag=True, default=None, help="With --full: train the choice of experts too.")
@_further("--seed", type=int, help="[default: 0]")
@_further("--ignore-memory", is_flag=True, help="Start although the prediction says it will not fit.")
@_watching("--evaluate-every", "--steps-per-eval", type=int, help="Steps between held-out losses.  [default: 100]")
@_watching("--save-every", type=int, help="Steps between checkpoints.  [default: 100]")
@_watching("--exact-match", type=click.IntRange(0), help="Held-out examples to answer each time.  [default: 0]")
def main(config: str | None, ignore_memory: bool, **options: Any) -> None:
    """Train by the denoising objective: one canvas of each answer is corrupted, and its clean text predicted.

    Data are JSON lines as mlx-lm reads them: {"messages": [...]} or {"prompt": ..., "completion": ...}; the last
    answer is what is learned. An interrupted run continues when the same command is given again.
    """
    chosen = {**_read_toml(config), **{key: value for key, value in options.items() if value is not None}}
    Run(chosen).main(ignore_memory)


def _read_toml(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return tomllib.loads(Path(path).read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


class Run:
    """What the options ask for, checked, and the run itself."""

    def __init__(self, options: dict[str, Any]):
        from .files.adapters import Lora
        from .training.settings import Settings

        known = {f.name for f in fields(Settings)}
        if unknown := options.keys() - known - OWN:
            raise ConfigError(
                f"unknown training options: {', '.join(sorted(unknown))}.\nSee: mlx_diffgemma.train --help"
            )
        if "data" not in options:
            raise ConfigError("--data is needed: a folder with train.jsonl, or a Hub dataset.")
        if "betas" in options:
            options["betas"] = tuple(options["betas"])
        self.scratch: str | None = options.get("from_scratch")
        self.full = bool(options.get("full") or self.scratch)
        if self.scratch and options.get("model"):
            raise ConfigError("--from-scratch starts from random weights: --model would do nothing.")
        lora_options = [name for name in LORA if options.get(name)]
        if self.full and lora_options:
            raise ConfigError(f"--{lora_options[0]} belongs to LoRA and would do nothing in a full training.")
        if options.get("train_router") and not self.full:
            raise ConfigError("--train-router needs --full: LoRA does not adapt the router.")
        self.options = options
        self.settings: Settings = Settings(**{key: options[key] for key in known & options.keys()})
        self.lora: Lora = _lora(options)
        self.output = Path(options.get("output", "adapters"))

    def main(self, ignore_memory: bool) -> None:
        import mlx.core as mx

        from .files import adapters
        from .files.checkpoint import read_config
        from .files.hub import resolve
        from .files.weights import load_network
        from .model.network import Network
        from .text.tokenizer import Tokenizer
        from .training import preparation, trainer
        from .training.data import ends_of, read_data

        self.first = mx.distributed.init().rank() == 0
        folder = Path(self.scratch) if self.scratch else resolve(self.options.get("model") or BUILT_IN)
        tokenizer = Tokenizer.load(folder)
        train, valid = read_data(self.options["data"], tokenizer)
        if self.scratch:
            network = Network(read_config(folder))
            preparation.initialize(network, self.settings.seed)
        else:
            network = load_network(folder, lazy=True)
        if not self.full:
            adapters.attach(network, self.lora, seed=self.settings.seed)
        preparation.prepare(network, self.settings)
        self._check_memory(network, train, ignore_memory)
        run = trainer.Trainer(
            network,
            self.settings,
            examples=train,
            held_out=valid,
            ends=ends_of(tokenizer, self.settings.fill),
            folder=self.output / "checkpoints",
        )
        if run.batches.left_out:
            self.say(f"{run.batches.left_out} examples are longer than {self.settings.max_length} tokens: left out.")
        self._loop(run, network, folder, valid)
        if self.first:
            self._write(network, folder)

    def _loop(self, run: Any, network: "Network", folder: Path, valid: list["Example"]) -> None:
        from .training.trainer import Evaluated, Trained

        shown, start = 0.0, time.perf_counter()
        self.output.mkdir(parents=True, exist_ok=True)
        with (self.output / "log.jsonl").open("a") as log:
            for event in run.run():
                if not self.first:
                    continue
                record = {"event": type(event).__name__.lower(), "time": round(time.perf_counter() - start, 1)}
                record |= {f.name: getattr(event, f.name) for f in fields(event) if f.name != "folder"}
                if isinstance(event, Evaluated):
                    record |= self._score(network, folder, valid)
                log.write(json.dumps(record) + "\n")
                log.flush()
                if isinstance(event, Evaluated):
                    self.say(_evaluation(event, record))
                elif isinstance(event, Trained) and (time.perf_counter() - shown > 10 or event.step == event.steps):
                    shown = time.perf_counter()
                    self.say(_progress(event))

    def _score(self, network: "Network", folder: Path, valid: list["Example"]) -> dict[str, float]:
        """How many of the first held-out examples the default sampler answers exactly, and in how many steps."""
        from .files.checkpoint import read_generation_config
        from .training.scoring import answers

        if not (count := self.options.get("exact_match", 0)) or not valid:
            return {}
        settings = read_generation_config(folder)
        given = list(answers(network, valid[:count], settings, seed=self.settings.seed))
        steps = [row.steps for _, _, rows in given for row in rows]
        right = sum(ids == example.response for example, ids, _ in given)
        return {"exact_match": right / len(given), "mean_steps": sum(steps) / len(steps)}

    def _check_memory(self, network: "Network", examples: list["Example"], ignore: bool) -> None:
        """Nothing is computed yet: sizes are known, weights are still on disk. Layers are recomputed if only that
        makes the run fit."""
        from .model.memory import machine_limit
        from .training.preparation import memory_needed

        have = machine_limit()
        longest = max(e.length for e in examples if e.length <= self.settings.max_length)
        needed = memory_needed(network, self.settings, longest)
        if needed > have and "checkpoint_layers" not in self.options:
            less = replace(self.settings, checkpoint_layers=True)
            if (smaller := memory_needed(network, less, longest)) <= have:
                self.say(f"Turning on --checkpoint-layers: about {needed / 1e9:.1f} GB would be needed without.")
                self.settings, needed = less, smaller
        self.say(f"Needs about {needed / 1e9:.1f} GB of memory; this machine gives {have / 1e9:.1f} GB.")
        if needed > have and not ignore:
            raise MemoryLimitError(
                f"training needs about {needed / 1e9:.1f} GB, this machine gives {have / 1e9:.1f} GB.\n"
                "Lower batch_size, max_length or rank, use --checkpoint-layers or a quantized model,"
                " or insist with --ignore-memory."
            )

    def _write(self, network: "Network", folder: Path) -> None:
        from .files import adapters
        from .files.weights import write_model

        if not self.full:
            adapters.save(network, self.lora, self.output)
            self.say(f"Adapter: {self.output}  (mlx_diffgemma.generate --adapter-path {self.output})")
            if self.options.get("peft"):
                self._write_peft(network)
            if not self.options.get("fuse"):
                return
            adapters.fuse(network)
        write_model(network, folder, self.output / "model")
        self.say(f"Model: {self.output / 'model'}  (mlx_diffgemma.generate --model {self.output / 'model'})")

    def _write_peft(self, network: "Network") -> None:
        """For the model that was trained; for a pack, which transformers cannot read, the released one."""
        from .config import RELEASED
        from .files.peft import save_peft

        base = RELEASED if network.config.quantization else self.options.get("model") or str(BUILT_IN)
        save_peft(network, self.lora, self.output / "peft", base=base)
        self.say(f"PEFT: {self.output / 'peft'}  (for transformers; not for merge_and_unload, which adds it twice)")

    def say(self, line: str) -> None:
        if self.first:
            click.echo(line)


def _lora(options: dict[str, Any]) -> "Lora":
    from .files import adapters

    values = {key: options[key] for key in ("rank", "scale") if key in options}
    if wanted := options.get("targets"):
        names = wanted.split(",") if isinstance(wanted, str) else wanted
        if unknown := [name for name in names if name not in TARGETS]:
            raise ConfigError(f"unknown LoRA targets {', '.join(unknown)}; known: {', '.join(TARGETS)}.")
        values["keys"] = tuple(key for name in names for key in getattr(adapters, TARGETS[name]))
    return adapters.Lora(**values)


def _progress(event: "Trained") -> str:
    left = (event.steps - event.step) * event.seconds
    return (
        f"step {event.step}/{event.steps} · loss {event.loss:.3f} (canvas {event.decoder_loss:.3f},"
        f" next token {event.encoder_loss:.3f}) · {event.tokens / event.seconds:,.0f} tokens/s"
        f" · {event.peak_memory_bytes / 1e9:.1f} GB · {left / 60:.0f} min left"
    )


def _evaluation(event: "Evaluated", record: dict[str, Any]) -> str:
    match = record.get("exact_match")
    score = "" if match is None else f" · exact {match:.0%} in {record['mean_steps']:.1f} steps"
    return f"step {event.step} · held out: canvas {event.decoder_loss:.3f}, next token {event.encoder_loss:.3f}{score}"


if __name__ == "__main__":
    main()
