"""Two processes train together: what stops one stops the other."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

WORKER = """
import sys
from pathlib import Path
import mlx.core as mx
from mlx_diffgemma.errors import TrainingError
from mlx_diffgemma.training import preparation
from mlx_diffgemma.training.data import Ends, Example
from mlx_diffgemma.training.settings import Settings
from mlx_diffgemma.training.trainer import Trained, Trainer
from tests import small

mx.disable_compile()
settings, network = Settings(steps=4, batch_size=2), small.network()
preparation.prepare(network, settings)
examples = [Example(prompt=(2, 40, 41), response=(50 + i,)) for i in range(4)]
ends = Ends(stop=small.TURN_END, fill=small.EOS)
run = Trainer(network, settings, examples=examples, held_out=[], ends=ends, folder=Path(sys.argv[1]))
assert run.group.size() == 2
try:
    for event in run.run():
        if isinstance(event, Trained) and event.step == 2 and run.group.rank() == 1:
            run.network.decoder.norm.weight = run.network.decoder.norm.weight * mx.nan
except TrainingError as error:
    print(str(error).splitlines()[0])
"""


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_loss_that_is_no_number_on_one_process_stops_all(tmp_path: Path) -> None:
    """The other would wait for its gradients for ever."""
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port()}"] for _ in range(2)]))
    begun = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path / "run")],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=100)[0] for process in begun]
    finally:
        for process in begun:
            process.kill()
    assert said == ["the loss is nan at step 3: training stopped. The last good weights are in\n"] * 2
