"""Whether two commits give the same bits: ids and entropies of the same runs, made by both on this machine.

    python -m benchmarks.bits OLD NEW              two commits, or folders: . is the working tree
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
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks import common
from benchmarks.bits_runs import FLOATS, RANDOM, RUNS, Record, Run

WORKER = Path(__file__).with_name("bits_runs.py")
BOUND, CONFIDENCE = 0.1, 0.005  # the models' own entropy bound and confidence threshold, in nats


# -------------------------------------------------------------------------------------------------------- both sides


@contextmanager
def tree(side: str, folder: Path) -> Iterator[Path]:
    """A commit's files in a worktree at `folder`, as long as the context lasts; a path is the tree it names."""
    if side.startswith((".", "/")):
        yield Path(side).resolve()
        return
    git = ["git", "-C", str(common.ROOT), "worktree"]
    if subprocess.run([*git, "add", "--quiet", "--detach", str(folder), side]).returncode:
        raise SystemExit(f"{side}: expected a commit, or a folder that begins with . or /.")
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def python(tree: Path, *arguments: object) -> "subprocess.Popen[str]":
    """This interpreter with a tree's package; -P: not with what lies beside a script."""
    command = [sys.executable, "-P", *map(str, arguments)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, **pipes)


def wait(process: "subprocess.Popen[str]") -> None:
    said, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{said}\n{process.args} ended with status {process.returncode}.")


def make_models(old: Path, folder: Path, names: set[str]) -> None:
    """The models of the runs: the built-in one, random ones of its shapes, and its packs by OLD's converter."""
    folder.mkdir()
    built_in = next((old / "mlx_diffgemma").rglob("model.safetensors")).parent
    shutil.copytree(built_in, folder / "built-in")
    for name in sorted(names - {"built-in"}):
        if name in RANDOM:
            make_random(built_in, folder / name, RANDOM[name])
        else:
            recipe = name.removesuffix("-float32")  # MLX's CPU has no bfloat16 products of experts that are not packed
            how = ("--recipe", recipe, *(("--dtype", "float32") if recipe != name else ()))
            wait(python(old, "-m", "mlx_diffgemma.convert", "--hf-path", built_in, "--mlx-path", folder / name, *how))


def make_random(built_in: Path, folder: Path, vocabulary: int) -> None:
    """A model with the built-in one's names and shapes, but `vocabulary` ids and random weights.

    Matrices keep the size of what passes through them. Branches are made smaller and logits sharper, so that a
    step accepts some of the canvas and a later one more. No tokenizer: prompts are ids.
    """
    folder.mkdir()
    random = np.random.default_rng(vocabulary)
    weights = {}
    old: Any = mx.load(str(built_in / "model.safetensors"))
    for name in sorted(old):
        shape = (vocabulary, *old[name].shape[1:]) if name.endswith("embed_tokens.weight") else old[name].shape
        values = random.standard_normal(shape, np.float32)
        values = values / shape[-1] ** 0.5 if len(shape) > 1 else 1 + 0.2 * values
        scale = 0.3 if "post_attention" in name or name.endswith("post_feedforward_layernorm.weight") else 1.0
        weights[name] = mx.array((values * (1.5 if name.endswith("decoder.norm.weight") else scale)).astype(np.float32))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    config = (built_in / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"vocab_size": 640', f'"vocab_size": {vocabulary}'))
    shutil.copy(built_in / "generation_config.json", folder)


def compare(old: str, new: str, names: Sequence[str]) -> list["Difference"]:
    """How the runs differ, each made by both sides."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with tree(old, folder / "old") as first, tree(new, folder / "new") as second:
            make_models(first, folder / "models", {RUNS[name].model for name in names})
            sides = [ask(side, folder, out, runs=names) for side, out in ((first, "a"), (second, "b"))]
            try:
                before, after = (answer(side, folder / out) for side, out in zip(sides, "ab", strict=True))
            finally:
                for side in sides:
                    side.kill()  # the other one, if one has failed or we are ended
            found = [difference(name, before[name], after[name]) for name in names]
            return measured([each for each in found if each], first, folder)


def measured(found: "list[Difference]", old: Path, folder: Path) -> "list[Difference]":
    """The same differences, with how far OLD's draws were from NEW's guesses."""
    asked = {each.run: each.guess for each in found if each.guess}
    if not asked:
        return found
    distances = answer(ask(old, folder, "c", distances=[(run, *guess) for run, guess in asked.items()]), folder / "c")
    draws = dict(zip(asked, distances, strict=True))
    return [replace(each, draw=draws.get(each.run)) for each in found]


def ask(tree: Path, folder: Path, out: str, **questions: Sequence[Any]) -> "subprocess.Popen[str]":
    """A side at work on `runs` or `distances`; its answer will be the file `out`."""
    asked = folder / f"{out}.json"
    asked.write_text(json.dumps(questions))
    paths = ("--models", folder / "models", "--out", folder / out, "--asked", asked)
    return python(tree, WORKER, "--tree", tree, *paths)


def answer(process: "subprocess.Popen[str]", out: Path) -> Any:
    wait(process)
    return pickle.loads(out.read_bytes())


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
    guess: tuple[tuple[int, int, int], int] | None = None  # a changed guess's canvas, step, position; NEW's id
    draw: float | None = None  # by how much OLD's draw there would have to move to give it

    def __str__(self) -> str:
        equal = "" if self.kind == "failed" else "entropies equal"
        entropies = f"entropies to {self.nats:.1e} nats, {self.ulps} ulp" if self.ulps else equal
        near = "" if self.draw is None else f"OLD guesses so too with a draw moved by {self.draw:.1e}"
        return "; ".join(filter(None, [f"{self.run}: {self.kind} from {self.where}", self.ids, near, entropies]))


def difference(name: str, old: list[Record] | str, new: list[Record] | str) -> Difference | None:
    """How two sides of a run differ; None where every bit is equal."""
    if isinstance(old, str) or isinstance(new, str):
        sides = {side: found for side, found in (("OLD", old), ("NEW", new)) if isinstance(found, str)}
        return Difference(run=name, kind="failed", where=", ".join(sides), ids="; ".join(sides.values()))
    first, ulps, nats = "", 0, 0.0
    for (where, a), (other, b) in zip(old, new, strict=False):
        for key in a.keys() & set(FLOATS) if where == other else ():
            here, there = apart(a[key], b[key])
            first = first or (where if here else "")
            ulps, nats = max(ulps, here), max(nats, there)
        changed = (
            [key for key in a if key not in FLOATS and not np.array_equal(a[key], b[key])] if where == other else []
        )
        if where != other or changed:
            kind = "text" if changed == ["text"] else "ids"
            what = f"NEW is at {other}" if where != other else "; ".join(told(RUNS[name], key, a, b) for key in changed)
            guess = drawn(RUNS[name], where, a, b) if "guess" in changed else None
            return Difference(run=name, kind=kind, where=where, ids=what, ulps=ulps, nats=nats, guess=guess)
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


def drawn(run: Run, where: str, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> Any:
    """The first changed guess as (canvas, step, position), NEW's id; None if its draw cannot be moved."""
    if not run.recorded or run.turns or run.settings.get("greedy"):
        return None
    canvas, step = map(int, re.findall(r"\d+", where))
    position = int(np.argmax(a["guess"][0] != b["guess"][0]))
    return (canvas, step, position), int(b["guess"][0, position])


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
    words = {
        "entropies": "with other entropies",
        "ids": "with other ids",
        "text": "with other texts",
        "failed": "failed",
    }
    count = {kind: sum(difference.kind == kind for difference in found) for kind in words}
    told = [f"{count[kind]} {words[kind]}" for kind in words if count[kind] or kind in ("entropies", "ids")]
    return f"{runs} runs: {runs - len(found)} equal, {', '.join(told)}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", nargs="?", default="HEAD", help="a commit, or a folder that begins with . or /")
    parser.add_argument("new", nargs="?", default=".", help="likewise")
    parser.add_argument("--only", default=[""], nargs="+", metavar="WORD", help="runs whose names contain one of these")
    parser.add_argument("--list", action="store_true", help="print the names of the runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what differs there")
    options = parser.parse_args(arguments)
    names = [name for name in RUNS if any(word in name for word in options.only)]
    if options.list or not names:
        print(*(names or RUNS), sep="\n")
        return 0 if names else 2
    found = compare(options.old, options.new, names)
    print(*found, summary(len(names), found), sep="\n")
    if options.json:
        document = common.provenance() | {"old": options.old, "new": options.new, "runs": names}
        document |= {"summary": summary(len(names), found), "differences": [asdict(difference) for difference in found]}
        options.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return int(any(difference.kind != "entropies" for difference in found))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that worktrees go even then
    sys.exit(main())
