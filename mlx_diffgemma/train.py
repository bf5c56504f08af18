"""`mlx_diffgemma.train`: fine-tune with LoRA or in full, or train a small model from scratch."""

import json
import re
import shutil
import time
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli import command
from .errors import ConfigError, MemoryLimitError, TrainingError

if TYPE_CHECKING:
    from .adapters import Lora
    from .network import Network
    from .tokenizer import Tokenizer
    from .trainer import Ends, Evaluated, Example, Trained

TARGETS = {"attention": "ATTENTION", "dense": "DENSE", "experts": "EXPERTS"}
SPLITS = {"train": "train|training", "valid": "valid|validation|val|dev"}  # and what else files of one are called
LORA = ("rank", "scale", "targets", "fuse", "peft")  # options that mean nothing without an adapter
OWN = {"model", "from_scratch", "data", "output", "full", "exact_match", *LORA}  # the others are Settings'
ASIDE = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@command("train")
@click.option("--model", metavar="PATH|REPO", help="What to fine-tune.  [default: the small built-in model]")
@click.option("--from-scratch", metavar="FOLDER", help="Instead: random weights; FOLDER has config and tokenizer.")
@click.option("--data", metavar="PATH|REPO", help="train.jsonl and valid.jsonl: a folder, or a Hub dataset.")
@click.option("--output", metavar="FOLDER", help="Checkpoints, log and the result.  [default: adapters]")
@click.option("--config", metavar="FILE.toml", help="The same options in a file; the command line wins.")
@click.option("--full", is_flag=True, default=None, help="Train every weight instead of a LoRA adapter.")
@click.option("--rank", type=click.IntRange(1), help="LoRA rank.  [default: 16]")
@click.option("--scale", type=float, help="LoRA scale, alpha / rank.  [default: 2]")
@click.option("--targets", help="What LoRA adapts: attention, dense, experts.  [default: attention,dense]")
@click.option("--steps", type=int, help="Optimizer steps.  [default: 800]")
@click.option("--batch-size", type=int, help="Examples per gradient.  [default: 8]")
@click.option("--accumulate", type=int, help="Gradients per step.  [default: 1]")
@click.option("--learning-rate", type=float, help="At the end of the warmup.  [default: 1.5e-4]")
@click.option("--warmup", type=int, help="Steps until then.  [default: 25]")
@click.option("--optimizer", type=click.Choice(["adamw", "muon"]), help="[default: adamw]")
@click.option("--max-length", type=int, help="Leave out longer examples.  [default: 4096 tokens]")
@click.option("--checkpoint-layers", is_flag=True, default=None, help="Less memory, more time.  [default: if it must]")
@click.option("--train-router", is_flag=True, default=None, help="With --full: train the choice of experts too.")
@click.option("--seed", type=int, help="[default: 0]")
@click.option("--evaluate-every", type=int, help="Steps between held-out losses.  [default: 100]")
@click.option("--save-every", type=int, help="Steps between checkpoints.  [default: 100]")
@click.option("--exact-match", type=click.IntRange(0), help="Held-out examples to answer each time.  [default: 0]")
@click.option("--fuse", is_flag=True, default=None, help="Also write the model with the adapter merged.")
@click.option("--peft", is_flag=True, default=None, help="Also write the adapter in PEFT's format, for transformers.")
@click.option("--ignore-memory", is_flag=True, help="Start although the prediction says it will not fit.")
def main(config: str | None, ignore_memory: bool, **options: Any) -> None:
    """Train by the denoising objective: one canvas of each answer is corrupted, and its clean text predicted.

    Data are JSON lines as mlx-lm reads them: {"messages": [...]} or {"prompt": ..., "completion": ...}; the last
    answer is what is learned. An interrupted run continues when the same command is given again.

    \b
    Memory, predicted before the start:
      weights + 16 bytes per trained parameter (gradient, two moments, update)
      + batch size x (length + 1.5 canvases) x what a layer keeps x layers (one layer with --checkpoint-layers)
      + logits of 64 Mi entries at a time
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
        from .adapters import Lora
        from .trainer import Settings

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

        from . import adapters, trainer
        from .checkpoint import load_network, read_config, resolve
        from .network import Network
        from .tokenizer import Tokenizer

        self.first = mx.distributed.init().rank() == 0
        folder = Path(self.scratch) if self.scratch else resolve(self.options.get("model") or builtin())
        tokenizer = Tokenizer.load(folder)
        train, valid = read_data(self.options["data"], tokenizer)
        if self.scratch:
            network = Network(read_config(folder))
            trainer.initialize(network, self.settings.seed)
        else:
            network = load_network(folder, lazy=True)
        if not self.full:
            adapters.attach(network, self.lora, seed=self.settings.seed)
        trainer.prepare(network, self.settings)
        self._check_memory(network, train, ignore_memory)
        run = trainer.Trainer(
            network,
            self.settings,
            examples=train,
            held_out=valid,
            ends=_ends(tokenizer, self.settings.fill),
            folder=self.output / "checkpoints",
        )
        if run.batches.left_out:
            self.say(f"{run.batches.left_out} examples are longer than {self.settings.max_length} tokens: left out.")
        self._loop(run, network, folder, valid)
        if self.first:
            self._write(network, folder)

    def _loop(self, run: Any, network: "Network", folder: Path, valid: list["Example"]) -> None:
        from .trainer import Evaluated, Trained

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
        from .checkpoint import read_generation_config
        from .trainer import answers

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
        from .pipeline import machine_limit
        from .trainer import memory_needed

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
        from . import adapters

        if not self.full:
            adapters.save(network, self.lora, self.output)
            self.say(f"Adapter: {self.output}  (mlx_diffgemma.generate --adapter {self.output})")
            if self.options.get("peft"):
                self._write_peft(network)
            if not self.options.get("fuse"):
                return
            adapters.fuse(network)
        write_model(network, folder, self.output / "model")
        self.say(f"Model: {self.output / 'model'}  (mlx_diffgemma.generate --model {self.output / 'model'})")

    def _write_peft(self, network: "Network") -> None:
        """For the model that was trained; for a pack, which transformers cannot read, the released one."""
        from . import adapters
        from .config import RELEASED

        base = RELEASED if network.config.quantization else self.options.get("model") or builtin()
        adapters.save_peft(network, self.lora, self.output / "peft", base=base)
        self.say(f"PEFT: {self.output / 'peft'}  (for transformers; not for merge_and_unload, which adds it twice)")

    def say(self, line: str) -> None:
        if self.first:
            click.echo(line)


def _ends(tokenizer: "Tokenizer", fill: str) -> "Ends":
    """An answer is closed by <turn|> and filled up with <eos>, or with <turn|> again; a tokenizer that lacks one of
    them gives its own end of text. Errors: TrainingError when it has none."""
    from .trainer import Ends

    named = [tokenizer.id_of(token) for token in ("<turn|>", "<eos>")]
    own = next(iter(tokenizer.stop_ids), None)
    turn, eos = (own if found is None else found for found in named)
    if turn is None or eos is None:
        raise TrainingError("the tokenizer has no <turn|>, no <eos> and no eos_token: nothing can end an answer.")
    return Ends(turn, eos if fill == "eos" else turn)


def builtin() -> str:
    """The folder of the built-in model."""
    return str(Path(__file__).parent / "demo")


def _lora(options: dict[str, Any]) -> "Lora":
    from . import adapters

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


def write_model(network: "Network", source: Path, folder: Path) -> None:
    """A checkpoint under the released names (packed matrices under those of a pack), with the vision tower and all
    else that lies in `source`."""
    import mlx.core as mx

    from .adapters import leaves
    from .checkpoint import is_vision

    folder.mkdir(parents=True, exist_ok=True)
    found = leaves(network.parameters())
    weights = {}
    for name, weight in found.items():
        stacked = ".experts." in name and name.replace(".weight", ".scales") not in found
        weights["model." + (name.removesuffix(".weight") if stacked else name)] = weight
    for file in sorted(source.glob("model*.safetensors")):
        beside: Any = mx.load(str(file))
        weights |= {name: tensor for name, tensor in beside.items() if is_vision(name)}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    for name in ("config.json", *ASIDE):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


# ------------------------------------------------------------------------------------------------------------ data


def read_data(path_or_repo: str, tokenizer: "Tokenizer") -> tuple[list["Example"], list["Example"]]:
    """Training and held-out examples: of a folder with train.jsonl and, if there is one, valid.jsonl, or of a Hub
    dataset, where the files may lie in one folder, in several parts, and say train, and valid, validation, val or dev.

    Errors: TrainingError naming file and line.
    """
    folder = Path(path_or_repo)
    if folder.is_dir():
        files = {split: [folder / f"{split}.jsonl"] for split in SPLITS if (folder / f"{split}.jsonl").is_file()}
        if "train" not in files:
            raise TrainingError(
                f"{folder} has no train.jsonl.\nOne JSON object a line: messages, or prompt and completion."
            )
    else:
        files = _hub_files(path_or_repo)
    train, valid = (
        [example for file in files.get(split, []) for example in _read(file, tokenizer)] for split in SPLITS
    )
    return train, valid


def _hub_files(repo: str) -> dict[str, list[Path]]:
    """The .jsonl files of a Hub dataset by split; a single file without a split's name is the training data."""
    folder = _dataset(repo)
    found = sorted(folder.rglob("*.jsonl"))
    if not found:
        raise TrainingError(
            f"{repo} has no .jsonl file; parquet and other forms are not read.\n"
            f'Make one: datasets.load_dataset("{repo}")["train"].to_json("my-data/train.jsonl"), then --data my-data.'
        )
    files: dict[str, list[Path]] = {}
    for split, names in SPLITS.items():
        named = re.compile(rf"(^|[^a-z])({names})([^a-z]|$)")
        if matching := [file for file in found if named.search(file.relative_to(folder).as_posix().lower())]:
            files[split] = matching
    if "train" not in files and len(found) == 1:
        files["train"] = found
    if "train" not in files:
        names = ", ".join(file.relative_to(folder).as_posix() for file in found[:3])
        raise TrainingError(f"{repo} has no file for training, only {names}.\nExpected train.jsonl, in any folder.")
    folders = sorted({file.parent for file in files["train"]})
    if len(folders) > 1:
        raise TrainingError(
            f"{repo} has training data in {len(folders)} folders: {folders[0].name or '.'}, {folders[1].name}, …\n"
            f"Choose one: --data {folders[0]}"
        )
    return files


def _dataset(repo: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(repo, repo_type="dataset", allow_patterns=["*.jsonl"]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise TrainingError(f"{repo} is no folder and no dataset that can be fetched: {str(error)[:120]}") from None


def _read(file: Path, tokenizer: "Tokenizer") -> list["Example"]:
    from .trainer import Example

    examples = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            messages, answer, tools = _conversation(json.loads(line))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise TrainingError(
                f'{file}:{number}: {error}.\nExpected {{"messages": [..., an assistant\'s]}} or'
                ' {"prompt": text, "completion": text}.'
            ) from None
        prompt = tokenizer.apply_chat_template(messages, tools=tools)
        examples.append(Example(prompt=tuple(prompt), response=tuple(tokenizer.encode(answer))))
    if not examples:
        raise TrainingError(f"{file} has no examples.")
    return examples


def _conversation(values: Any) -> tuple[list[dict[str, Any]], str, list[dict[str, Any]] | None]:
    """The messages before the last answer, that answer, and the tools the model may call."""
    if not isinstance(values, dict):
        raise ValueError(f"a {type(values).__name__} instead of an object")
    if "prompt" in values:
        prompt, answer = values["prompt"], values["completion"]
        if not isinstance(prompt, str) or not isinstance(answer, str):
            raise ValueError("prompt and completion are not both text")
        return [{"role": "user", "content": prompt}], answer, values.get("tools")
    *before, last = values["messages"]
    if last["role"] not in ("assistant", "model") or not isinstance(last["content"], str):
        raise ValueError("the last message is no text by the assistant")
    return before, last["content"], values.get("tools")


if __name__ == "__main__":
    main()
