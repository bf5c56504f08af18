"""`mlx_diffgemma.train`: fine-tune with LoRA or in full, or train a small model from scratch."""

import json
import time
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli import command
from .disk import existing_file, new_folder, reason, user_path
from .errors import ConfigError, MemoryLimitError, TrainingError
from .files.shipped import BUILT_IN
from .options import Number, Option
from .readers import read_toml
from .values import Field, Table, either, flag, integer, many, nearest, number, text

if TYPE_CHECKING:
    from collections.abc import Callable

    from .files.adapters import Lora
    from .model.network import Network
    from .training.data import Example
    from .training.trainer import Evaluated, Started, Trained, Trainer

TARGETS = {"attention": "ATTENTION", "dense": "DENSE", "experts": "EXPERTS"}
OWN = Table(  # the others are training.settings'
    *(Field(name, text(empty=False), None) for name in ("model", "from_scratch", "data", "output")),
    *(Field(name, flag, None) for name in ("full", "fuse", "peft")),
    Field("rank", integer(least=1, most=1 << 16), None),
    Field("scale", number(above=0), None),
    Field("targets", either(text(empty=False), many(text(empty=False), least=1)), None),
    Field("exact_match", integer(least=0), None),
    open=True,
)
LORA = ("rank", "scale", "targets", "fuse", "peft")  # options that mean nothing without an adapter

_COUNT, _ABOVE_0 = click.IntRange(1), Number(0, min_open=True)
_lora_option = partial(click.option, cls=Option, section="LoRA")
_further = partial(click.option, cls=Option, section="Training")
_watching = partial(click.option, cls=Option, section="Watching it")


@command("train", machines="each")
@click.option("--model", metavar="PATH|REPO", help="What to fine-tune.  [default: the built-in one]")
@click.option("--data", metavar="PATH|REPO", help="Folder or Hub dataset with train.jsonl.")
@click.option("--output", "--adapter-path", metavar="DIR", help="Where the result goes.  [default: adapters]")
@click.option("--steps", "--iters", type=_COUNT, metavar="N", help="Optimizer steps.  [default: 800]")
@click.option("--batch-size", type=_COUNT, metavar="N", help="Examples per gradient.  [default: 8]")
@click.option("--learning-rate", type=_ABOVE_0, metavar="X", help="After the warmup.  [default: 1.5e-4]")
@click.option("--max-length", "--max-seq-length", metavar="N", type=_COUNT, help="Longest example.  [default: 4096]")
@click.option("--full", is_flag=True, default=None, help="Train every weight, no adapter.")
@click.option("--config", metavar="FILE.toml", help="The same options in a file.")
@_lora_option("--rank", type=_COUNT, help="LoRA rank.  [default: 16]")
@_lora_option("--scale", type=_ABOVE_0, help="LoRA scale, alpha / rank.  [default: 2]")
@_lora_option("--targets", help="What LoRA adapts: attention, dense, experts.  [default: attention,dense]")
@_lora_option("--fuse", is_flag=True, default=None, help="Also write the model with the adapter merged.")
@_lora_option("--peft", is_flag=True, default=None, help="Also write it in PEFT's format, for transformers.")
@_further("--from-scratch", metavar="FOLDER", help="Random weights; FOLDER has config and tokenizer.")
@_further("--accumulate", "--grad-accumulation-steps", type=_COUNT, help="Gradients per step.  [default: 1]")
@_further("--warmup", type=click.IntRange(0), help="Steps until the learning rate is reached.  [default: 25]")
@_further("--optimizer", type=click.Choice(["adamw", "muon"]), help="[default: adamw]")
@_further(
    "--checkpoint-layers",
    "--grad-checkpoint",
    is_flag=True,
    default=None,
    help="Less memory, more time.  [default: if it must]",
)
@_further("--train-router", is_flag=True, default=None, help="With --full: train the choice of experts too.")
@_further("--seed", type=click.IntRange(0), help="[default: 0]")
@_further("--ignore-memory", is_flag=True, help="Start although the prediction says it will not fit.")
@_watching("--evaluate-every", "--steps-per-eval", type=_COUNT, help="Steps between held-out losses.  [default: 100]")
@_watching("--save-every", type=_COUNT, help="Steps between checkpoints.  [default: 100]")
@_watching("--exact-match", type=click.IntRange(0), help="Held-out examples to answer each time.  [default: 0]")
def main(config: str | None, ignore_memory: bool, **options: Any) -> None:
    """Train by the denoising objective: one canvas of each answer is corrupted, and its clean text predicted.

    Data are JSON lines as mlx-lm reads them: {"messages": [...]} or {"prompt": ..., "completion": ...}; the last
    answer is what is learned. An interrupted run continues when the same command is given again.
    """
    given = {key: value for key, value in options.items() if value is not None}
    Run({**_read_toml(config), **given}).main(ignore_memory)


def _read_toml(path: str | None) -> dict[str, Any]:
    """The options in a file. Errors: ConfigError naming file and key."""
    from .training.settings import OPTIONS

    if path is None:
        return {}
    values = read_toml(existing_file(path, "--config"))
    known = OPTIONS.names | OWN.names
    if unknown := [key for key in values if key not in known]:
        raise ConfigError(f"{path} has the unknown key {unknown[0]}.{nearest(unknown[0], known)}")
    own = OWN.given({key: value for key, value in values.items() if key in OWN.names}, path)
    chosen = {key: values[key] for key in values if key in OPTIONS.names}
    kinds = {option.name: option.kind for option in OPTIONS.fields}
    return own | {key: kinds[key].read(value, path, key) for key, value in chosen.items()}


class Run:
    """What the options ask for, checked, and the run itself."""

    def __init__(self, options: dict[str, Any]):
        from .files.adapters import Lora
        from .training.settings import OPTIONS, Settings

        own = OWN.given({key: value for key, value in options.items() if key in OWN.names}, "train")
        if "data" not in own:
            raise ConfigError("--data is needed: a folder with train.jsonl, or a Hub dataset.")
        self.scratch: str | None = own.get("from_scratch")
        self.full = bool(own.get("full") or self.scratch)
        if self.scratch and own.get("model"):
            raise ConfigError("--from-scratch starts from random weights: --model would do nothing.")
        lora_options = [name for name in LORA if own.get(name)]
        if self.full and lora_options:
            raise ConfigError(f"--{lora_options[0]} belongs to LoRA and would do nothing in a full training.")
        if options.get("train_router") and not self.full:
            raise ConfigError("--train-router needs --full: LoRA does not adapt the router.")
        self.options = options
        self.settings: Settings = Settings(**{key: options[key] for key in OPTIONS.names & options.keys()})
        self.lora: Lora = _lora(options)
        self.output = new_folder(own.get("output", "adapters"), "--output")

    def main(self, ignore_memory: bool) -> None:
        import mlx.core as mx

        from .files import adapters
        from .files.checkpoint import read_config
        from .files.folder import fingerprint_of
        from .files.hub import resolve
        from .files.weights import check_apart, load_network
        from .model.network import Network
        from .text.tokenizer import Tokenizer
        from .training import preparation, trainer
        from .training.data import ends_of, read_data

        self.first = mx.distributed.init().rank() == 0
        folder = self._folder(resolve)
        if self.full or self.options.get("fuse"):
            check_apart(self.output / "model", folder)
        tokenizer = Tokenizer.load(folder)
        self.say("Reading the data …")
        train, valid = read_data(self.options["data"], tokenizer)
        if self.scratch:
            network = Network(read_config(folder))
            preparation.initialize(network, self.settings.seed)
        else:
            network = load_network(folder, lazy=True)
        if not self.full:
            adapters.attach(network, self.lora, seed=self.settings.seed)
        preparation.prepare(network, self.settings)
        self._check_memory(network, [*train, *valid], ignore_memory)
        run = trainer.Trainer(
            network,
            self.settings,
            examples=train,
            held_out=valid,
            ends=ends_of(tokenizer, self.settings.fill),
            folder=self.output / "checkpoints",
            origin={"base": fingerprint_of(folder), "adapter": None if self.full else asdict(self.lora)},
        )
        longest = self.settings.max_length
        for count, kind in ((run.batches.left_out, "examples"), (run.held_out_left_out, "held-out examples")):
            if count:
                self.say(f"{count} {kind} are longer than {longest} tokens (--max-length): left out.")
        try:
            self._loop(run, network, folder, run.held_out)
            if self.first:
                self._write(network, folder)
        except OSError as error:
            raise TrainingError(
                f"--output {self.output} stopped growing: {reason(error)}.\n"
                "Finished checkpoints are kept: see to it, then run the same command again."
            ) from error

    def _folder(self, resolve: "Callable[[str | Path], Path]") -> Path:
        """Where base, config and tokenizer lie. Errors: ConfigError, CheckpointError."""
        if not self.scratch:
            return resolve(self.options.get("model", BUILT_IN))
        folder = user_path(self.scratch, "--from-scratch")
        if not folder.is_dir():
            raise ConfigError(f"--from-scratch {folder}: there is no such folder.")
        return folder

    def _loop(self, run: "Trainer", network: "Network", folder: Path, valid: list["Example"]) -> None:
        from .training.trainer import Evaluated, Started, Trained

        shown, start = 0.0, time.perf_counter()
        pace = _StepTime()
        self.output.mkdir(parents=True, exist_ok=True)
        with (self.output / "log.jsonl").open("a", encoding="utf-8") as log:
            for event in run.run():
                if not self.first:
                    continue
                if isinstance(event, Started):
                    self._begin(event)
                    continue
                record = {"event": type(event).__name__.lower(), "time": round(time.perf_counter() - start, 1)}
                record |= {f.name: getattr(event, f.name) for f in fields(event) if f.name != "folder"}
                if isinstance(event, Evaluated):
                    record |= self._score(network, folder, valid)
                log.write(json.dumps(record) + "\n")
                log.flush()
                if isinstance(event, Evaluated):
                    self.say(_evaluation(event, record))
                elif isinstance(event, Trained):
                    pace.add(event.seconds)
                    if time.perf_counter() - shown > 10 or event.step == event.steps:
                        shown = time.perf_counter()
                        self.say(_progress(event, pace))

    def _begin(self, event: "Started") -> None:
        if not event.locked:
            self.say(f"{self.output} is on a disk without locks: see to it that nothing else trains there.")
        if event.step == event.steps:
            self.say(f"This run is finished: {event.steps} steps were done. What it gives is written again.")
        elif event.step:
            self.say(f"Continuing from step {event.step} of {event.steps}.")
        else:
            self.say(f"Step 1 of {event.steps} is being compiled …")

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
        longest = max((e.length for e in examples if e.length <= self.settings.max_length), default=1)
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
        names = [name.strip() for name in (wanted.split(",") if isinstance(wanted, str) else wanted)]
        if unknown := [name for name in names if name not in TARGETS]:
            raise ConfigError(f"--targets: unknown LoRA targets {unknown}; known: {', '.join(TARGETS)}.")
        values["keys"] = tuple(key for name in names for key in getattr(adapters, TARGETS[name]))
    return adapters.Lora(**values)


class _StepTime:
    """Seconds a step, as the last ones took; the first, which is compiled, does not count once there is another."""

    def __init__(self) -> None:
        self.seconds: float | None = None
        self.count = 0

    def add(self, seconds: float) -> None:
        self.count += 1
        before = seconds if self.seconds is None or self.count == 2 else self.seconds
        self.seconds = 0.9 * before + 0.1 * seconds

    def left(self, steps: int) -> str:
        """How long so many steps will take, in words; nothing is known before the second."""
        if self.seconds is None or self.count < 2:
            return "time left: known soon"
        minutes = steps * self.seconds / 60
        return f"{minutes:.0f} min left" if minutes >= 1 else f"{steps * self.seconds:.0f} s left"


def _progress(event: "Trained", pace: _StepTime) -> str:
    return (
        f"step {event.step}/{event.steps} · loss {event.loss:.3f} (canvas {event.decoder_loss:.3f},"
        f" next token {event.encoder_loss:.3f}) · {event.tokens / event.seconds:,.0f} tokens/s"
        f" · {event.peak_memory_bytes / 1e9:.1f} GB · {pace.left(event.steps - event.step)}"
    )


def _evaluation(event: "Evaluated", record: dict[str, Any]) -> str:
    match = record.get("exact_match")
    score = "" if match is None else f" · exact {match:.0%} in {record['mean_steps']:.1f} steps"
    return f"step {event.step} · held out: canvas {event.decoder_loss:.3f}, next token {event.encoder_loss:.3f}{score}"


if __name__ == "__main__":
    main()
