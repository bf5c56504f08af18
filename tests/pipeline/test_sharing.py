"""Several machines share a model: the same bits as one, whoever goes away."""

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import load
from mlx_diffgemma.errors import ConfigError, DiffGemmaError, PeerError
from mlx_diffgemma.files import checkpoint
from mlx_diffgemma.files.shipped import BUILT_IN
from mlx_diffgemma.model.network import leaves
from mlx_diffgemma.model.sharing.group import Meeting, Member
from mlx_diffgemma.model.sharing.ranks import HEAD, join
from mlx_diffgemma.model.sharing.share import Share
from mlx_diffgemma.packing.conversion import convert, plan_conversion
from mlx_diffgemma.packing.recipes import load_recipe
from mlx_diffgemma.pipeline.following import load_in_pieces
from mlx_diffgemma.pipeline.machine import link
from mlx_diffgemma.pipeline.model import DiffusionGemma
from tests import seeing, synthetic
from tests.pipeline import shared_runs

KINDS = ["sliding_attention", "full_attention"] * 2
TIMEOUT = 60  # seconds: what hangs must fail
RANDOM = [*shared_runs.RUNS, "batch", "picture"]


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small random model that four machines can share, in float32 and in q4; and the built-in one.

    MLX's own kernels multiply what is packed, a row of output at a time, whichever rows there are. What is plain a CPU
    leaves to BLAS, which chooses by shape: there only attention's products, of the same shapes for every head.
    """
    folder = tmp_path_factory.mktemp("packs")
    small = {"hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 64, "head_dim": 16}
    small |= {"num_attention_heads": 8, "num_key_value_heads": 4, "num_global_key_value_heads": 4, "vocab_size": 640}
    small |= {"global_head_dim": 32, "num_experts": 4, "num_hidden_layers": len(KINDS), "layer_types": KINDS}
    tokens = ("boi_token_id", "image_token_id", "eoi_token_id", "vision_soft_tokens_per_image")
    pictures = {name: seeing.CONFIG[name] for name in tokens}
    config = synthetic.small_config(**small) | {"canvas_length": 16} | pictures
    source = synthetic.small(folder / "source", config=config, dtype="F32")
    seeing.write_tokenizer(source)
    recipe = replace(load_recipe("q4"), dtype="float32")
    convert(plan_conversion(checkpoint.open_checkpoint(source), recipe), folder / "q4")
    return {"float32": source, "q4": folder / "q4", "built-in": BUILT_IN}


@pytest.fixture(scope="module")
def alone(packs: dict[str, Path]) -> dict[str, str]:
    """What one machine says with the packed model."""
    return shared_runs.hashes(load(packs["q4"]), RANDOM)


@pytest.mark.parametrize("count", [2, 4])
def test_pieces_have_one_machines_bits(packs: dict[str, Path], alone: dict[str, str], count: int) -> None:
    """Ids, entropies and log-probabilities."""
    model = load_in_pieces(packs["q4"], count)
    assert shared_runs.hashes(model, RANDOM) == alone
    model.network.tuning.share.end()


def states(model: DiffusionGemma) -> np.ndarray:
    """What a canvas behind a prefix becomes, with a signal."""
    network, canvas = model.network, mx.arange(16)[None]
    cache = network.make_cache()
    network.encode(mx.array([shared_runs.PROMPT]), cache)
    signal = network.denoise(canvas, cache, None)
    return np.array(network.denoise(canvas, cache, signal))


@pytest.mark.parametrize("name", ["float32", "built-in"])
@pytest.mark.parametrize("count", [2, 4])
def test_plain_pieces_are_those_of_the_whole(packs: dict[str, Path], name: str, count: int) -> None:
    """To rounding; of the built-in model's full layers all machines share the one key head."""
    model = load_in_pieces(packs[name], count)
    expected, got = states(load(packs[name])), states(model)
    assert np.abs(got - expected).max() < 2e-5 * np.abs(expected).max()
    model.network.tuning.share.end()


def test_a_thread_that_has_ended_is_noticed(packs: dict[str, Path]) -> None:
    model = load_in_pieces(packs["q4"], 2)
    share = model.network.tuning.share
    with pytest.raises(PeerError, match="that step is none"), share.announced("encode", inputs=mx.zeros((1, 1))):
        raise ConfigError("that step is none")
    with pytest.raises(PeerError, match="that step is none"):
        states(model)
    share.end()


class Machines:
    """Processes that share a model, as mlx.launch starts them."""

    def __init__(self, commands: Sequence[Sequence[str]], folder: Path):
        hosts = folder / f"hosts-{time.monotonic_ns()}.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(len(commands))]))
        own = os.environ | {"MLX_HOSTFILE": str(hosts), "OPENBLAS_NUM_THREADS": "1"}
        pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        pipes["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # ignored in a background job
        self.processes = [
            subprocess.Popen([sys.executable, "-m", *command], env=own | {"MLX_RANK": str(rank)}, text=True, **pipes)
            for rank, command in enumerate(commands)
        ]

    def end(self, seconds: float = TIMEOUT) -> list[tuple[int, str, str]]:
        """Status, output and errors of each. Errors: TimeoutExpired."""
        until = time.monotonic() + seconds
        ended = []
        for process in self.processes:
            out, err = process.communicate(timeout=max(until - time.monotonic(), 0.1))
            ended.append((process.returncode, out, err))
        return ended


@contextmanager
def machines(folder: Path, *commands: Sequence[str]) -> Iterator[Machines]:
    """A command for each machine."""
    started = Machines(commands, folder)
    try:
        yield started
    finally:
        for process in started.processes:
            process.kill()
            process.communicate()


def heard(process: "subprocess.Popen[str]") -> str:
    """The next line that it prints."""
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], TIMEOUT)[0], "nothing was said"
    return process.stdout.readline()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def own_bytes(pack: Path, count: int) -> int:
    """Of the first of so many machines: its rows of every matrix, and all of the rest."""
    network, share, total = load(pack).network, Share(0, count), 0
    for name, array in leaves(network.parameters()).items():
        spans = share.spans(network.config, name) or ((0, array.shape[-2] if array.ndim > 1 else 1),)
        rows = sum(stop - start for start, stop in spans)
        total += array.nbytes * rows // (array.shape[-2] if array.ndim > 1 else 1)
    return total


@pytest.mark.parametrize("count", [2, 4])
def test_machines_say_what_one_says(packs: dict[str, Path], alone: dict[str, str], tmp_path: Path, count: int) -> None:
    """By hash; each machine holds, reads and sends its part. They may stream."""
    pack = packs["q4"]
    jobs = [{"pack": str(pack), "stream": 3, "runs": ["short"]}]
    if count == 2:  # of four processes on two cores an exchange takes 50 ms
        jobs += [{"pack": str(pack), "stream": 0, "runs": ["short"]}]
        jobs += [{"pack": str(BUILT_IN), "stream": 0, "runs": ["talk"]}]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    with machines(tmp_path, *[["tests.pipeline.shared_runs", str(tmp_path / "jobs.json")]] * count) as started:
        (status, out, err), *others = started.end()
    assert (status, [status for status, _, _ in others]) == (0, [0] * (count - 1)), (err, others)
    streamed, *rest = (json.loads(line) for line in out.splitlines())
    assert streamed["hashes"] == {"short": alone["short"]} and streamed["read"]
    config = checkpoint.open_checkpoint(pack).config
    step, expected = streamed["step"], link.of_step(config, count, item_size=4)
    assert (step["gathers"], step["gathered_bytes"]) == (expected.count, expected.nbytes)
    said = link.messages(config, config.canvas_length, 4).nbytes
    assert said < step["message_bytes"] < said + 3 * HEAD
    if rest:
        resident, built_in = rest
        assert resident["hashes"] == streamed["hashes"] and not resident["read"]
        assert resident["weights"] == own_bytes(pack, count)
        model = load_in_pieces(BUILT_IN, count)
        assert built_in["hashes"] == shared_runs.hashes(model, ["talk"])
        model.network.tuning.share.end()


NAMES = "Sort these names:\nNora, Ben, Zoe, Ivo, Ada, Kim"


def generate(*arguments: str) -> list[str]:
    return ["mlx_diffgemma.generate", "--prompt", NAMES, *arguments]


def test_the_first_one_alone_reads_and_prints(tmp_path: Path) -> None:
    """The recorded noise is on the first machine alone; standard input stays open, as mlx.launch leaves it."""
    request = load().prepare(NAMES, seed=3)
    recorder, [expected] = request.record(), request.run()
    recorder.save(tmp_path / "noise.npz", prompt=None, settings={}, seed=3, tuning="")
    own = generate("--noise", str(tmp_path / "noise.npz"), "--json")
    with machines(tmp_path, own, generate("--json")) as started:
        (status, out, err), others = started.end()
    assert (status, err, others) == (0, "", (0, "", ""))
    assert json.loads(out)["text"] == expected.text != ""


COMMANDS: dict[str, tuple[list[str], str]] = {
    "edit": (["FOLDER/names.txt", "--lines", "1-2", "--prompt", "Sort these names", "--seed", "1"], r"^-Nora$"),
    "decide": (["--prompt", "Is it blue?", "--choice", "yes", "--choice", "no"], r"^answer: (yes|no) .*no \d"),
    "bench": (
        ["--repeat", "1", "--only", "fact", "--output", "FOLDER/bench.json"],
        r"^A step takes .* computing .*the link [\d.,]+; the limit is",
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_other_commands_that_are_shared(tmp_path: Path, name: str) -> None:
    (tmp_path / "names.txt").write_text("Nora\nBen\nZoe\n")
    arguments, says = COMMANDS[name]
    command = [f"mlx_diffgemma.{name}", *(part.replace("FOLDER", str(tmp_path)) for part in arguments)]
    with machines(tmp_path, command, command) as started:
        (status, out, err), other = started.end()
    assert (status, other) == (0, (0, "", "")), err
    assert re.search(says, out, re.MULTILINE), out


LONG = ("--events", "--max-denoising-steps", "5000", "--confidence-threshold", "0", "--seed", "1")  # it never settles


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_machine_ends_the_rest_with_one_line(tmp_path: Path, lost: int) -> None:
    with machines(tmp_path, *[generate(*LONG)] * 2) as started:
        assert heard(started.processes[0])
        started.processes[lost].kill()
        begun = time.monotonic()
        ended = started.end()
    assert time.monotonic() - begun < 5
    status, _, err = ended[1 - lost]
    assert status == 1 and err.count("\n") == 1 and "was lost" in err, err


def test_a_pass_that_waits_for_a_lost_machine_for_ever_is_ended() -> None:
    """What MLX's ring says when it gives up may come in pieces, of two threads."""
    code = """
import os, time
from mlx_diffgemma import joined
joined._overhear()
os.write(2, b"a word of another library\\n[ring] [ring]Receiving Socket from 6 was closed by the peer\\n failed\\n")
os.write(2, b"[ring] Too many send/recv errors. Failing pending tasks...\\n" * 2)
time.sleep(30)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT)
    assert ended.returncode == 1
    assert re.fullmatch("a word of another library\nError: another machine .* was lost; .*\n", ended.stderr)


def test_a_machine_that_is_lost_while_the_first_one_listens(tmp_path: Path) -> None:
    with machines(tmp_path, *[["mlx_diffgemma.chat"]] * 2) as started:
        first, other = started.processes
        assert first.stdin is not None
        first.stdin.write("/stats\n")
        first.stdin.flush()
        assert heard(first) == "nothing was said yet\n"
        time.sleep(2)  # by now the other sleeps between looks
        other.kill()
        first.wait(5)
        (status, _, err), _ = started.end()
    assert status == 1 and "was lost" in err.splitlines()[-1], err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_one_that_waits_for_the_others(tmp_path: Path, number: signal.Signals) -> None:
    """MLX looks for them for half a minute."""
    absent = ["http.server", "--bind", "127.0.0.1", str(free_ports(1)[0])]  # one that never comes
    with machines(tmp_path, generate(), absent) as started:
        first = started.processes[0]
        with pytest.raises(subprocess.TimeoutExpired):
            first.wait(3)  # by now it looks
        first.send_signal(number)
        assert first.wait(2) == -number


def test_ctrl_c_ends_all(tmp_path: Path) -> None:
    with machines(tmp_path, *[generate(*LONG)] * 2) as started:
        assert heard(started.processes[0])
        for process in started.processes:  # as a terminal sends it to all
            process.send_signal(signal.SIGINT)
        begun = time.monotonic()
        (status, _, err), other = started.end()
    assert time.monotonic() - begun < 5
    assert (status, other) == (130, (0, "", "")) and not err.count("Error"), err


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["mlx_diffgemma.score", "hello"], "score runs on one machine: start it without mlx.launch"),
        (["mlx_diffgemma.generate", "--prompt", "-"], "mlx.launch never closes standard input"),
        (["mlx_diffgemma.bench", "--steps"], "--steps and --without measure one machine"),
    ],
)
def test_a_command_that_is_not_for_several_machines_says_so(tmp_path: Path, command: list[str], says: str) -> None:
    with machines(tmp_path, command, command) as started:  # mlx.launch ends the others then
        first = started.processes[0]
        out, err = first.communicate(timeout=TIMEOUT)
    assert (first.returncode, out, err.count("\n")) == (1, "", 1) and says in err


REFUSALS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "three machines": ([{}, {}, {}], "3 machines were launched; a model is shared by 2 or 4"),
    "another pack": ([{"pack": "q4"}, {"pack": "float32"}], "have different packs: the first"),
    "another option": ([{"trunk": "packed"}, {}], "have different options: the first trunk packed"),
    "no pack": ([{}, {"pack": "nowhere"}], "machine 2 of 2: .*config.json is missing"),
    "an adapter": ([{"adapter": "some"}] * 2, "an adapter is not cut"),
    "too little memory": ([{"memory_limit": 1000}] * 2, "needs at least"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_shared_is_refused(packs: dict[str, Path], tmp_path: Path, case: str) -> None:
    """By the first machine, in words; the others end silently."""
    each, says = REFUSALS[case]
    places = packs | {"nowhere": tmp_path}
    raised: dict[int, BaseException] = {}

    def run(member: Member, pack: str = "q4", **options: Any) -> None:
        try:
            load(places[pack], share=join(member), **options)
        except BaseException as error:
            raised[member.rank] = error

    members = Meeting(len(each)).members()
    threads = [threading.Thread(target=run, args=[member], kwargs=each[member.rank]) for member in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert isinstance(raised[0], DiffGemmaError) and re.search(says, str(raised[0])), raised
    assert len(str(raised[0]).splitlines()) <= 3
    assert all(isinstance(raised[rank], SystemExit | ConfigError) for rank in range(1, len(each)))
