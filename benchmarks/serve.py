"""Two servers beside each other: ours and mlx-vlm's, the same model and requests, one at a time and four at once.

    python -m benchmarks.serve                       the built-in model, its own tasks
    python -m benchmarks.serve --model FOLDER --rounds 5 --requests 20

Each server is a process of its own; they take turns, so that neither works while the other is asked. mlx-vlm runs in
its faithful setting (entropy-bound sampler, temperature 1, full canvas); random draws differ, so the steps do. Requests
stream. "First text" is the first committed text; "first draft" is what ours shows before, when drafts are asked for:
mlx-vlm's server has none. Ratios are ours ÷ theirs, of medians over rounds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks import common

FAITHFUL = {"temperature": 1.0, "diffusion_full_canvas": True, "diffusion_sampler": "entropy-bound"}
PORTS = {"ours": 8311, "mlx-vlm": 8312}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request: seconds since it was sent."""

    draft: float | None
    text: float
    end: float


def command(side: str, model: Path) -> list[str]:
    module = {"ours": "mlx_diffgemma.serve", "mlx-vlm": "mlx_vlm.server"}[side]
    return [sys.executable, "-m", module, "--model", str(model), "--host", "127.0.0.1", "--port", str(PORTS[side])]


@contextmanager
def running(side: str, model: Path) -> Iterator[str]:
    """A server's address, once it answers."""
    url = f"http://127.0.0.1:{PORTS[side]}"
    process = subprocess.Popen(command(side, model), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                httpx.get(url + "/health", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def ask(client: httpx.Client, url: str, body: dict[str, Any]) -> Asked:
    begun, draft, text = time.perf_counter(), None, None
    with client.stream("POST", url + "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk, now = json.loads(line[6:]), time.perf_counter() - begun
            if draft is None and chunk.get("type") == "diffusion_frame" and chunk["text"].strip():
                draft = now
            if text is None and any(choice["delta"].get("content") for choice in chunk["choices"]):
                text = now
    end = time.perf_counter() - begun
    return Asked(draft=draft, text=end if text is None else text, end=end)


def round_of(url: str, bodies: list[dict[str, Any]], at_once: int) -> dict[str, float]:
    with httpx.Client(timeout=600) as client, ThreadPoolExecutor(at_once) as pool:
        begun = time.perf_counter()
        asked = list(pool.map(lambda body: ask(client, url, body), bodies))
        figures = {"requests_per_second": len(bodies) / (time.perf_counter() - begun)}
    figures["first_text_seconds"] = statistics.median(one.text for one in asked)
    drafts = [one.draft for one in asked if one.draft is not None]
    return figures | ({"first_draft_seconds": statistics.median(drafts)} if drafts else {})


def bodies(side: str, model: Path, count: int, number: int) -> list[dict[str, Any]]:
    own = {"diffusion": {"drafts": "text"}} if side == "ours" else {"model": str(model), **FAITHFUL}
    return [
        {
            "messages": [{"role": "user", "content": common.PROMPTS[i % len(common.PROMPTS)]}],
            "max_tokens": 256,
            "seed": 1000 * number + i,
            "stream": True,
            **own,
        }
        for i in range(count)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=common.DEMO)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=10, help="a round")
    options = parser.parse_args()
    found: dict[str, dict[str, list[dict[str, float]]]] = {side: {"1": [], "4": []} for side in PORTS}
    with ExitStack() as stack:
        urls = {side: stack.enter_context(running(side, options.model)) for side in PORTS}
        for number in range(options.rounds + 1):  # the first does not count
            for at_once in (1, 4):
                for side, url in urls.items():
                    asked = bodies(side, options.model, options.requests, number)
                    found[side][str(at_once)].append(round_of(url, asked, at_once))
    medians = {
        side: {
            at_once: {name: statistics.median(r[name] for r in rounds[1:]) for name in rounds[1]}
            for at_once, rounds in turns.items()
        }
        for side, turns in found.items()
    }
    for at_once in ("1", "4"):
        ours, theirs = medians["ours"][at_once], medians["mlx-vlm"][at_once]
        for name in ("requests_per_second", "first_text_seconds"):
            print(f"{at_once} at once: {name} {ours[name]:.3g} ÷ {theirs[name]:.3g} = {ours[name] / theirs[name]:.2f}")
        shown, waited = ours["first_draft_seconds"], theirs["first_text_seconds"]
        print(f"{at_once} at once: first draft {shown:.3g} ÷ first text {waited:.3g} = {shown / waited:.2f}")
    print(json.dumps({"provenance": common.provenance(), "medians": medians}))


if __name__ == "__main__":
    main()
