"""A file of prompts, killed again and again: is every line there once, and as in one go?

    python -m benchmarks.kills                              500 prompts on the built-in model, killed ten times
    python -m benchmarks.kills --prompts 60 --kills 3       a short look

`mlx_diffgemma.generate --input` is killed (SIGKILL) at random moments, each time after some more lines are done, and
started again; its replies are compared byte by byte with those of a run in one go, and their ids with those of the same
prompts one by one. A line whose ids differ one by one is listed. Exit status 1 for a line that is lost, twice there or
different from the run in one go.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import demo_score, train_demo
from mlx_diffgemma import load
from mlx_diffgemma.files.shipped import BUILT_IN

SEED = 11


def write_prompts(file: Path, count: int) -> None:
    """Held-out questions of every task, in turn."""
    tasks = (*train_demo.TASKS, "sudoku")
    each = [demo_score.held_out(task, -(-count // len(tasks))) for task in tasks]
    turns = [example for group in zip(*each, strict=True) for example in group][:count]
    rows = [{"id": f"q{number}", "prompt": example.prompt} for number, example in enumerate(turns)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def start(prompts: Path, target: Path, batch: int) -> subprocess.Popen[bytes]:
    asked = ["--input", prompts, "--output", target, "--seed", SEED, "--batch-size", batch, "--quiet"]
    return subprocess.Popen([sys.executable, "-m", "mlx_diffgemma.generate", *map(str, asked)])


def done(target: Path) -> int:
    """Lines in the journal."""
    journal = target.with_name(target.name + ".journal")
    records = journal.read_bytes().split(b"\n")[1:-1] if journal.exists() else []
    return sum(len(json.loads(record)["lines"]) for record in records)


def killed(prompts: Path, target: Path, batch: int, count: int, kills: int) -> list[int]:
    """Run, kill, run again, …, to the end; the numbers of lines that were done at each kill."""
    moments = sorted(random.Random(SEED).sample(range(batch, count - batch), kills))
    seen = []
    for moment in moments:
        process = start(prompts, target, batch)
        while process.poll() is None and done(target) < moment:
            time.sleep(0.02)
        time.sleep(random.Random(moment).random() * 0.2)  # anywhere in a batch
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen.append(done(target))
    assert start(prompts, target, batch).wait() == 0
    return seen


def compare(prompts: Path, whole: Path, cut: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    replies = [json.loads(line) for line in cut.read_text().splitlines()]
    model = load(BUILT_IN)
    alone = [model.generate(row["prompt"], seed=SEED + number) for number, row in enumerate(rows)]
    pairs = zip(replies, alone, strict=True)
    differing = [reply["id"] for reply, single in pairs if tuple(reply["ids"]) != single.tokens]
    return {
        "lines": len(replies),
        "every line once, in order": [reply["id"] for reply in replies] == [row["id"] for row in rows],
        "as in one go, byte by byte": whole.read_bytes() == cut.read_bytes(),
        "other ids than one by one": differing,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prompts, whole, cut = (Path(folder) / name for name in ("prompts.jsonl", "whole.jsonl", "cut.jsonl"))
        write_prompts(prompts, asked.prompts)
        assert start(prompts, whole, asked.batch_size).wait() == 0
        seen = killed(prompts, cut, asked.batch_size, asked.prompts, asked.kills)
        found = {"killed with so many lines done": seen} | compare(prompts, whole, cut)
    for name, value in found.items():
        print(f"{name}: {value}")
    good = found["every line once, in order"] and found["as in one go, byte by byte"]
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
