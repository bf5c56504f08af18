"""Whether two commits give the same bits: ids and entropies of the same runs, made by both on this machine.

    python -m benchmarks.bits OLD NEW              two commits, or . for this working tree
    python -m benchmarks.bits HEAD . --only batch  runs whose names contain a word; --list names them

Settings × prompt lengths × batches × seeds and recorded noise × conversations × recipes (bits_runs.py), on the built-in
model, on a random one that runs to the step limit, and on one with 20,000 ids. Each side is a process of its own, in a
git worktree that is removed afterwards; OLD makes the packs for both. Of a batch the front door shows committed ids,
and of every step how many it accepted and the last one's mean entropy. Results are never stored: BLAS picks kernels by
processor, so bits compare on one machine alone. The status is 1 when ids or texts differ, or a run fails.
"""

import argparse
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks import common
from benchmarks.bits_runs import FLOATS, RUNS, VOCABULARIES, Record, Run

WORKER = Path(__file__).with_name("bits_runs.py")
BOUND, CONFIDENCE = 0.1, 0.005  # the models' own entropy bound and confidence threshold, in nats


# -------------------------------------------------------------------------------------------------------- both sides


@contextmanager
def tree(commit: str, folder: Path) -> Iterator[Path]:
    """A commit's files in a worktree at `folder`, as long as the context lasts; "." is this working tree."""
    if commit == ".":
        yield common.ROOT
        return
    git = ["git", "-C", str(common.ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def python(tree: Path, *arguments: object) -> "subprocess.Popen[str]":
    """This interpreter with a tree's package; -P: not with what lies beside a script."""
    command = [sys.executable, "-P", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    return subprocess.Popen(
        command,
        cwd=tree,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def wait(process: "subprocess.Popen[str]") -> None:
    said, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{said}\n{process.args} ended with status {process.returncode}.")


def make_models(old: Path, folder: Path, names: set[str]) -> None:
    """The models of the runs: the built-in one, random ones of its shapes, and its packs by OLD's converter."""
    built_in = next((old / "mlx_diffgemma").rglob("model.safetensors")).parent
    shutil.copytree(built_in, folder / "built-in")
    for name in sorted(names - {"built-in"}):
        if name in VOCABULARIES:
            make_random(built_in, folder / name, VOCABULARIES[name])
        else:
            recipe = name.removesuffix("-float32")  # MLX's CPU has no bfloat16 products of experts that are not packed
            how = ("--recipe", recipe, *(("--dtype", "float32") if recipe != name else ()))
            wait(python(old, "-m", "mlx_diffgemma.convert", "--hf-path", built_in, "--mlx-path", folder / name, *how))


def make_random(built_in: Path, folder: Path, vocabulary: int) -> None:
    """A model with the built-in one's names and shapes, but `vocabulary` ids and random weights.

    Matrices keep the size of what passes through them. The branches are halved and the logits doubled, so that a step
    accepts some of the canvas, and a later one more. No tokenizer: prompts are ids.
    """
    folder.mkdir()
    random = np.random.default_rng(vocabulary)
    weights = {}
    old: Any = mx.load(str(built_in / "model.safetensors"))
    for name in sorted(old):
        shape = (vocabulary, *old[name].shape[1:]) if name.endswith("embed_tokens.weight") else old[name].shape
        values = random.standard_normal(shape, np.float32)
        values = values / shape[-1] ** 0.5 if len(shape) > 1 else 1 + 0.2 * values
        scale = 0.5 if "post_attention" in name or name.endswith("post_feedforward_layernorm.weight") else 1.0
        weights[name] = mx.array((values * (2.0 if name.endswith("decoder.norm.weight") else scale)).astype(np.float32))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    config = (built_in / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"vocab_size": 640', f'"vocab_size": {vocabulary}'))
    shutil.copy(built_in / "generation_config.json", folder)


def both(old: str, new: str, names: Sequence[str]) -> list[dict[str, list[Record] | str]]:
    """All runs by each side."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = folder / "models"
        models.mkdir()
        with tree(old, folder / "old") as first, tree(new, folder / "new") as second:
            make_models(first, models, {RUNS[name].model for name in names})
            outs = [folder / "old.pickle", folder / "new.pickle"]
            sides = [
                python(tree, WORKER, "--tree", tree, "--models", models, "--out", out, *names)
                for tree, out in zip((first, second), outs, strict=True)
            ]
            for side in sides:
                wait(side)
        return [pickle.loads(out.read_bytes()) for out in outs]


# --------------------------------------------------------------------------------------------------------- comparing


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How two sides of a run differ. Entropies are compared up to the first record whose ids differ: behind it the two
    walk different ways."""

    run: str
    kind: str  # "entropies", "ids", "text" or "failed"
    where: str  # turn, row, canvas, step of the first difference
    ids: str = ""  # what differs there, and how near it was to a tie
    ulps: int = 0  # the largest difference of an entropy, in units of the last place of float32
    nats: float = 0.0  # the largest one

    def __str__(self) -> str:
        entropies = f"entropies to {self.ulps} ulp, {self.nats:.1e} nats" if self.ulps else "entropies equal"
        return "; ".join(filter(None, [f"{self.run}: {self.kind} from {self.where}", self.ids, entropies]))


def compare(name: str, run: Run, old: list[Record] | str, new: list[Record] | str) -> Difference | None:
    """None where every bit is equal."""
    if isinstance(old, str) or isinstance(new, str):
        sides = {side: found for side, found in (("OLD", old), ("NEW", new)) if isinstance(found, str)}
        return Difference(run=name, kind="failed", where=", ".join(sides), ids="; ".join(sides.values()))
    first, ulps, nats = "", 0, 0.0
    for (where, a), (other, b) in zip(old, new, strict=False):
        for key in a.keys() & b.keys() & set(FLOATS) if where == other else ():
            here, there = apart(a[key], b[key])
            first = first or (where if here else "")
            ulps, nats = max(ulps, here), max(nats, there)
        changed = [key for key in a if key not in FLOATS and not np.array_equal(a[key], b.get(key))]
        if where != other or changed:
            kind = "text" if changed == ["text"] else "ids"
            what = f"NEW is at {other}" if where != other else "; ".join(told(run, key, a, b) for key in changed)
            return Difference(run=name, kind=kind, where=where, ids=what, ulps=ulps, nats=nats)
    if len(old) != len(new):
        return Difference(run=name, kind="ids", where="the end", ids=f"{len(old)} and {len(new)} records")
    return Difference(run=name, kind="entropies", where=first, ulps=ulps, nats=nats) if first else None


def apart(a: np.ndarray, b: np.ndarray) -> tuple[int, float]:
    """The largest difference of float32 arrays, in units of the last place and absolute; 0 only for equal bits."""
    if a.shape != b.shape:
        return 2**32, float("inf")
    order = [np.where(bits < 0, np.int64(-(2**31)) - bits - 1, bits) for bits in (_bits(a), _bits(b))]
    return int(np.abs(order[0] - order[1]).max(initial=0)), float(np.abs(a - b).max(initial=0))


def _bits(array: np.ndarray) -> np.ndarray:
    return np.atleast_1d(np.asarray(array, np.float32)).view(np.int32).astype(np.int64)


def told(run: Run, key: str, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> str:
    """How many entries of an array differ, the first of them, and how near the decision was."""
    if a[key].shape != b[key].shape or a[key].dtype.kind == "U":
        return f"{key} {str(a[key].tolist())[:60]} → {str(b[key].tolist())[:60]}"
    places = np.argwhere(np.atleast_1d(a[key] != b[key]))
    first = tuple(places[0][-a[key].ndim :]) if a[key].ndim else ()
    place = f" at {[int(i) for i in first]}" if first else ""
    text = f"{key}: {len(places)} of {a[key].size} differ{place}: {a[key][first]} → {b[key][first]}"
    return text + (f", {nearness(run, key, a['entropy'], first)}" if "entropy" in a else "")


def nearness(run: Run, key: str, entropy: np.ndarray, place: tuple[int, ...]) -> str:
    """How close a decision came to falling the other way, from OLD's entropies [B, L]."""
    if key == "settled":
        room = abs(float(entropy[place[0]].mean()) - run.settings.get("confidence_threshold", CONFIDENCE))
        return f"{room:.1e} nats from the confidence threshold"
    if key == "accepted":
        row = entropy[place[0]].astype(np.float64)
        order = np.argsort(row, kind="stable")
        ahead = np.empty_like(row)
        ahead[order] = np.cumsum(row[order]) - row[order]
        room = abs(ahead[place[1]] - run.settings.get("entropy_bound", BOUND))
        return f"{room:.1e} nats from the entropy bound"
    return f"entropy there {float(entropy[place]):.2e} nats"


# ----------------------------------------------------------------------------------------------------------- command


def summary(runs: int, found: Sequence[Difference]) -> str:
    count = {kind: sum(d.kind == kind for d in found) for kind in ("entropies", "ids", "text", "failed")}
    rare = [f"{count[k]} {words}" for k, words in (("text", "with other texts"), ("failed", "failed")) if count[k]]
    parts = (
        f"{runs - len(found)} equal",
        f"{count['entropies']} with other entropies",
        f"{count['ids']} with other ids",
    )
    return f"{runs} runs: " + ", ".join((*parts, *rare))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", nargs="?", default="HEAD", help="a commit, or . for this working tree")
    parser.add_argument("new", nargs="?", default=".", help="likewise")
    parser.add_argument("--only", default=[""], nargs="+", metavar="WORD", help="runs whose names contain one of these")
    parser.add_argument("--list", action="store_true", help="print the names of the runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what differs there")
    options = parser.parse_args(arguments)
    names = [name for name in RUNS if any(word in name for word in options.only)]
    if options.list or not names:
        print(*(names or RUNS), sep="\n")
        return 0 if names else 2
    old, new = both(options.old, options.new, names)
    pairs = ((name, compare(name, RUNS[name], old[name], new[name])) for name in names)
    found = [difference for _, difference in pairs if difference]
    print(*found, summary(len(names), found), sep="\n")
    if options.json:
        document = common.provenance() | {"old": options.old, "new": options.new, "runs": names}
        document |= {"summary": summary(len(names), found), "differences": [asdict(difference) for difference in found]}
        options.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return int(any(difference.kind != "entropies" for difference in found))


if __name__ == "__main__":
    sys.exit(main())
