"""Machines that share a model, as processes of this one: the same bits, and what happens when one is killed.

    python -m benchmarks.together bits                 one machine, two, four, with and without streaming: by hash
    python -m benchmarks.together killed --runs 20     a random one is killed at a random time
    python -m benchmarks.together stopped --runs 20    Ctrl-C at a random time, to all of them, as a terminal sends it

Every other run is lost from its start on, loading included; the others once the first event has come.

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
from typing import Any

from benchmarks import common

NAMES = "Sort these names:\nNora, Ben, Zoe, Ivo, Ada, Kim"
LONG = ("--events", "--max-denoising-steps", "5000", "--confidence-threshold", "0", "--seed", "1")  # it never settles
SECONDS = 60  # what takes longer hangs
LONGEST = 900  # seconds of runs that are compared; on busy cores an exchange of four may take 70 ms


def launched(count: int, *command: str, stdout: Any = subprocess.PIPE) -> "subprocess.Popen[str]":
    """A command on so many machines; a group of processes of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    launch = Path(sys.executable).with_name("mlx.launch")
    own = [str(launch), "-n", str(count), "--backend", "ring", "--starting-port", str(port), sys.executable, "-m"]
    return subprocess.Popen(
        [*own, *command],
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def children(process: "subprocess.Popen[str]", count: int) -> list[int]:
    """The machines' process numbers, once all have started; the shells that mlx.launch begins with hear no signals."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        told = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
        found = [int(word) for word in told.stdout.split()]
        if len(found) == count and all(b"\0-m\0" in Path(f"/proc/{n}/cmdline").read_bytes() for n in found):
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


def one_loss(rng: random.Random, kind: str, longest: float, generating: bool) -> list[object]:
    """Which, when, seconds until all were gone, and what was said."""
    with tempfile.TemporaryFile("w+") as events:  # a pipe would be full before long
        process = launched(2, "mlx_diffgemma.generate", "--prompt", NAMES, *LONG, stdout=events)
        try:
            machines = children(process, 2)
            after, lost = rng.uniform(0, longest), rng.randrange(2)
            if generating:
                wait_for_events(process, events.fileno())
            time.sleep(after)
            begun = time.monotonic()
            if kind == "killed":
                os.kill(machines[lost], signal.SIGKILL)
            else:
                os.killpg(process.pid, signal.SIGINT)
            gone = are_gone(machines, SECONDS)
            seconds = time.monotonic() - begun
            _, err = process.communicate(timeout=SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        events.seek(0)
        count = events.read().count("\n")
    lines = [line for line in err.splitlines() if line.startswith("Error:")]  # mlx.launch says more
    which = f"number {lost + 1}" if kind == "killed" else "all"
    when = f"{after:.1f} s after {'an event' if generating else 'the start'}"
    return [which, when, count, f"{seconds:.1f}" if gone else "never", len(lines), lines[0] if lines else ""]


def wait_for_events(process: "subprocess.Popen[str]", file: int) -> None:
    until = time.monotonic() + SECONDS
    while not os.fstat(file).st_size:
        if process.poll() is not None or time.monotonic() > until:
            raise SystemExit("no event came")
        time.sleep(0.02)


def losses(kind: str, runs: int, longest: float, seed: int) -> bool:
    rng = random.Random(seed)
    rows = [one_loss(rng, kind, longest, number % 2 == 1) for number in range(runs)]
    print(common.table(rows, ["which", "when", "events", "gone after s", "lines", "said"]))
    good = [row for row in rows if row[3] != "never" and float(str(row[3])) < 5 and int(str(row[4])) <= 1]
    print(f"\n{len(good)} of {runs} were over within 5 s, with at most one line.")
    return len(good) == runs


def random_pack(folder: Path, hidden: int, layers: int) -> Path:
    """A network in float32 whose pieces are large enough for a CPU to round them as wholes; it sees pictures."""
    from tests import seeing, synthetic

    small = synthetic.small_config(
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
        num_experts=32,
        vocab_size=4096,
    )
    tokens = ("boi_token_id", "image_token_id", "eoi_token_id", "vision_soft_tokens_per_image")
    config = small | {name: seeing.CONFIG[name] for name in tokens} | {"canvas_length": 64}
    synthetic.small(folder, config=config, dtype="F32", limit=1 << 40)
    seeing.write_tokenizer(folder)
    return folder


def by_machines(place: Path, pack: Path, count: int, stream: int, runs: list[str]) -> list[object]:
    """One row: what processes say, started by mlx.launch."""
    jobs = place / "jobs.json"
    jobs.write_text(json.dumps([{"pack": str(pack), "stream": stream, "runs": runs}]))
    process = launched(count, "tests.pipeline.shared_runs", str(jobs))
    try:
        out, err = process.communicate(timeout=LONGEST)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    found = re.search(r"^\{.*\}$", out, re.MULTILINE)
    if found is None:
        raise SystemExit(err)
    told = json.loads(found[0])
    sent = f"{told['step']['gathered_bytes'] / 1e6:.2f} MB in {told['step']['gathers']}"
    name = f"{count} machines" if count > 1 else "1 machine"
    return [name, stream, told["weights"], sent, told["hashes"]]


def by_one(pack: Path, stream: int, runs: list[str], pieces: int = 1) -> list[object]:
    """One row: what this process says, computing wholes or pieces."""
    from mlx_diffgemma import load
    from mlx_diffgemma.pipeline.following import load_in_pieces
    from tests.pipeline import shared_runs

    whole = pieces == 1
    model = load(pack, stream_experts=stream) if whole else load_in_pieces(pack, pieces, stream_experts=stream)
    hashes = shared_runs.hashes(model, runs)
    model.network.tuning.share.end()
    name = "1 machine" if whole else f"1 in {pieces} pieces"
    return [name, stream, shared_runs.weight_bytes(model.network), "", hashes]


def told_alike(title: str, runs: list[str], rows: Sequence[list[object]]) -> bool:
    """Print hashes of ids and entropies; whether those of a run are one."""
    cells, said = [], list[dict[str, str]]()
    for name, stream, nbytes, sent, hashes in rows:
        assert isinstance(nbytes, int) and isinstance(hashes, dict)
        said.append(hashes)
        cells.append([name, stream, f"{nbytes / 1e6:.0f}", sent, *(hashes[run][:12] for run in runs)])
    header = ["by", "layers streamed", "MB of weights", "gathered a step", *runs]
    common.report(cells, header, title)
    return all(hashes == said[0] for hashes in said)


def bits(hidden: int, layers: int) -> bool:
    """The random network by all; the built-in one, whose pieces a CPU rounds otherwise, by machines and in pieces."""
    from mlx_diffgemma.files.shipped import BUILT_IN

    with tempfile.TemporaryDirectory() as name:
        place, runs = Path(name), ["short", "greedy", "batch", "picture"]
        pack = random_pack(place / "pack", hidden, layers)
        rows = [by_one(pack, stream, runs) for stream in (0, layers // 2, layers)]
        rows += [by_machines(place, pack, count, stream, runs) for count, stream in ((2, 0), (4, 0), (2, layers))]
        good = told_alike("A random network, float32", runs, rows)
        runs = ["short", "talk"]
        for count in (1, 2, 4):
            rows = [by_one(BUILT_IN, stream, runs, count) for stream in (0, 3)]
            rows += [by_machines(place, BUILT_IN, count, stream, runs) for stream in (0, 3) if count > 1]
            good &= told_alike(f"The built-in model, {count} machine{'s' * (count > 1)}", runs, rows)
    print("All alike." if good else "Not alike.")
    return good


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["bits", "killed", "stopped"])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--longest", type=float, default=4.0, metavar="SECONDS", help="until it happens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args(arguments)
    if options.what == "bits":
        good = bits(options.hidden, options.layers)
    else:
        good = losses(options.what, options.runs, options.longest, options.seed)
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
