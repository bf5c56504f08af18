"""Runs on one machine or on several, by hash: started once a machine by test_sharing.py, and imported by it.

python -m tests.pipeline.shared_runs JOBS.json      jobs: [{"pack", "stream", "runs"}, …] → a JSON line for each
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mlx_diffgemma import load
from mlx_diffgemma.generation.events import Committed, Denoised
from mlx_diffgemma.model.memory import weight_bytes
from mlx_diffgemma.model.sharing.ranks import Leader, join
from mlx_diffgemma.pipeline.following import follow
from mlx_diffgemma.pipeline.model import DiffusionGemma
from tests import seeing

PROMPT = list(range(3, 27))
RUNS: dict[str, dict[str, Any]] = {
    "short": {"max_tokens": 16, "max_denoising_steps": 2},
    "plain": {},
    "greedy": {"greedy": True},
    "no stop at once": {"avoid_empty": True},
    "dense signal": {"sparse_signal": False},
    "scored": {"logprobs": 3},
    "short chunks": {"prefill_step_size": 7},
    "token by token": {"decoding": "autoregressive", "max_tokens": 4},
}


def told(model: DiffusionGemma, prompt: Any = PROMPT, **options: Any) -> str:
    """What a run says, by hash: ids and float32 entropies of every step, committed ids, log-probabilities."""
    found = hashlib.sha256()
    steps = {} if options.get("decoding") == "autoregressive" else {"max_denoising_steps": 3}
    options = {"seed": 5, "max_tokens": 32, **steps, **options}
    for event in model.prepare(prompt, **options).events():
        if isinstance(event, Denoised):
            found.update(np.array(event.best).tobytes() + np.array(event.entropy).tobytes())
        elif isinstance(event, Committed):
            found.update(repr([(row.ids, row.logprobs, row.top_logprobs) for row in event.rows]).encode())
    return found.hexdigest()


def talk(model: DiffusionGemma) -> str:
    """Two turns of a conversation, which forks its prefix; one of them is broken off."""
    chat = model.chat(seed=5, max_tokens=48, max_denoising_steps=2)
    said = chat.send("Sort these names:\nNora, Ben, Zoe").text
    events = chat.stream("Sort these names:\nKim, Ada")
    next(events)
    next(events)
    events.close()
    return hashlib.sha256((said + chat.send("Sort these names:\nIvo, Eva").text).encode()).hexdigest()


def hashes(model: DiffusionGemma, runs: list[str]) -> dict[str, str]:
    """Of the runs that are asked for by name."""
    found = {name: told(model, **RUNS[name]) for name in runs if name in RUNS}
    if "batch" in runs:  # rows of different lengths, which end one after the other
        prompts: Any = [PROMPT, PROMPT[:5], PROMPT[3:20]]
        found["batch"] = told(model, prompts, seed=None, seeds=[1, 2, 3], max_tokens=96)
    if "picture" in runs:
        found["picture"] = told(model, seeing.asked("What?", seeing.picture(1)))
    if "choices" in runs:
        found["choices"] = told(model, "hello", choices=["yes", "no", "perhaps not"])
    if "talk" in runs:
        found["talk"] = talk(model)
    return found


def one_step(model: DiffusionGemma) -> dict[str, int]:
    """What the leader's second step of a canvas exchanges, and the first."""
    share = model.network.tuning.share
    assert isinstance(share, Leader)
    counts: list[tuple[int, int, int]] = []
    events = model.prepare(PROMPT, seed=5, max_denoising_steps=3, sparse_signal=False).events()
    for event in events:
        counts.append((share.gathers, share.gathered_bytes, share.message_bytes))
        if isinstance(event, Denoised) and event.step == 1:
            events.close()  # type: ignore[attr-defined]
            break
    names = ("gathers", "gathered_bytes", "message_bytes")
    return dict(zip(names, (b - a for a, b in zip(*counts[-2:], strict=True)), strict=True))


def main(file: str) -> None:
    for job in json.loads(Path(file).read_text()):
        share = join()
        model = load(job["pack"], share=share, stream_experts=job["stream"])
        if share.rank:
            follow(model)
            continue
        begun = model.network.experts.traffic.nbytes
        made: dict[str, Any] = {"hashes": hashes(model, job["runs"]), "weights": weight_bytes(model.network)}
        made["read"] = model.network.experts.traffic.nbytes - begun
        made["step"] = one_step(model)
        share.end()
        print(json.dumps(made), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
