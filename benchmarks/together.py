"""Machines that share a model, as processes of this one: the same bits, and what happens when one is killed.

    python -m benchmarks.together bits                 a random network: one machine, two, four, two that stream
    python -m benchmarks.together killed --runs 20     a random one is killed at a random time, loading included
    python -m benchmarks.together stopped --runs 20    Ctrl-C at a random time, to all of them, as a terminal sends it

The processes are started by mlx.launch. On few cores this is slow: MLX's ring waits by looking again and again.
"""

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import common

NAMES = "Sort these names:\nNora, Ben, Zoe, Ivo, Ada, Kim"
LONG = ("--events", "--max-denoising-steps", "5000", "--confidence-threshold", "0", "--seed", "1")  # it never settles
SECONDS = 60  # what takes longer hangs


def launched(count: int, *command: str) -> "subprocess.Popen[str]":
    """A command on so many machines; a group of processes of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    launch = Path(sys.executable).with_name("mlx.launch")
    own = [str(launch), "-n", str(count), "--backend", "ring", "--starting-port", str(port), sys.executable, "-m"]
    return subprocess.Popen(
        [*own, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def children(process: "subprocess.Popen[str]", count: int) -> list[int]:
    """The machines' process numbers, once all have started."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        told = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
        if len(found := [int(word) for word in told.stdout.split()]) == count:
            return found
        time.sleep(0.05)
    raise SystemExit("the machines did not start")


def are_gone(numbers: Sequence[int], seconds: float) -> bool:
    """Whether all of these processes end within so many seconds."""
    until = time.monotonic() + seconds
    while any(Path(f"/proc/{number}").exists() for number in numbers):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def one_loss(rng: random.Random, kind: str, longest: float) -> list[object]:
    """Which, when, seconds until all were gone, and what was said."""
    process = launched(2, "mlx_diffgemma.generate", "--prompt", NAMES, *LONG)
    try:
        machines = children(process, 2)
        after, lost = rng.uniform(0, longest), rng.randrange(2)
        time.sleep(after)
        begun = time.monotonic()
        if kind == "killed":
            os.kill(machines[lost], signal.SIGKILL)
        else:
            os.killpg(process.pid, signal.SIGINT)
        gone = are_gone(machines, SECONDS)
        seconds = time.monotonic() - begun
        out, err = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    lines = [line for line in err.splitlines() if line.startswith("Error:")]
    which = f"number {lost + 1}" if kind == "killed" else "all"
    said = lines[0] if lines else ""
    return [which, f"{after:.1f}", out.count("\n"), f"{seconds:.1f}" if gone else "never", len(lines), said]


def losses(kind: str, runs: int, longest: float, seed: int) -> bool:
    rng = random.Random(seed)
    rows = [one_loss(rng, kind, longest) for _ in range(runs)]
    print(common.table(rows, ["which", "after s", "events", "gone after s", "lines", "said"]))
    good = [row for row in rows if row[3] != "never" and float(str(row[3])) < 5 and int(str(row[4])) <= 1]
    print(f"\n{len(good)} of {runs} were over within 5 s, with at most one line.")
    return len(good) == runs


def bits(hidden: int, layers: int) -> bool:
    """Hashes of ids and entropies; what a machine holds."""
    from mlx_diffgemma import load
    from tests import synthetic
    from tests.pipeline import shared_runs

    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as place:
        config = synthetic.small_config(
            hidden_size=hidden,
            intermediate_size=hidden * 2,
            moe_intermediate_size=hidden,
            num_attention_heads=8,
            num_key_value_heads=4,
            num_global_key_value_heads=4,
            head_dim=hidden // 4,
            global_head_dim=hidden // 2,
            num_hidden_layers=layers,
            layer_types=["sliding_attention", "full_attention"] * (layers // 2),
            vocab_size=4096,
        ) | {"canvas_length": 64}
        pack = synthetic.small(Path(place) / "pack", config=config, dtype="F32")
        runs = ["short"]
        model = load(pack, stream_experts=0)
        alone = shared_runs.hashes(model, runs)
        rows.append(
            ["1", f"{shared_runs.weight_bytes(model.network) / 1e6:.0f}", "", *(alone[run][:12] for run in runs)]
        )
        del model
        for count, stream in ((2, 0), (2, layers), (4, 0)):
            jobs = Path(place) / "jobs.json"
            jobs.write_text(json.dumps([{"pack": str(pack), "stream": stream, "runs": runs}]))
            process = launched(count, "tests.pipeline.shared_runs", str(jobs))
            out, err = process.communicate()
            found = re.search(r"^\{.*\}$", out, re.MULTILINE)
            if found is None:
                raise SystemExit(err)
            told = json.loads(found[0])
            step = told["step"]
            sent = f"{step['gathered_bytes'] / 1e6:.2f} MB in {step['gathers']}"
            name = f"{count}{', all experts streamed' * bool(stream)}"
            rows.append([name, f"{told['weights'] / 1e6:.0f}", sent, *(told["hashes"][run][:12] for run in runs)])
    print(common.table(rows, ["machines", "MB of weights", "gathered a step", *runs]))
    return len({tuple(row[3:]) for row in rows}) == 1


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["bits", "killed", "stopped"])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--longest", type=float, default=8.0, metavar="SECONDS", help="until it happens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args(arguments)
    if options.what == "bits":
        good = bits(options.hidden, options.layers)
    else:
        good = losses(options.what, options.runs, options.longest, options.seed)
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
