"""A model is loaded in one thread and used in another, whose end is not the end of the process."""

import subprocess
import sys

SCRIPT = """
import sys, threading
import mlx.core as mx
from mlx_diffgemma import load
from mlx_diffgemma.files.shipped import BUILT_IN

said = []

def in_a_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

for turn in range(50):
    models = []
    in_a_thread(lambda: models.append(load(BUILT_IN)))
    short = {"max_tokens": 4, "max_denoising_steps": 2}
    in_a_thread(lambda: said.append(models[0].generate("Hi", seed=turn % 5, **short).tokens))
assert len(said) == 50 and said[:5] * 10 == said, said
print("done")
"""


def test_load_in_one_thread_and_generate_in_another() -> None:
    """The first generation is in a thread that did not load, 50 times; the process ends with status 0 though threads
    that used MLX ended before it."""
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout.strip()) == (0, "done"), run.stderr[-2000:]
