"""The server under load: clients that come, go away in the middle and send what they like, and kills.

    python -m benchmarks.serve_soak                                   8 clients for 10 minutes, then 20 shutdowns
    python -m benchmarks.serve_soak --minutes 1 --shutdowns 4

Every answer that arrives whole is held against the first one of the same request: it is the same, or something was
mixed. One request in five leaves at a random moment. Then servers are ended by SIGTERM and SIGINT in turn in the middle
of a stream, which must give status 0, and one by SIGKILL, after which it starts again on the same port. Printed are
requests by fate, the resident memory early and late, and the time to the first text. Exit status 1 for an answer that
is lost, mixed, or has a control token in it, for memory that grew by more than `--allow` MB, for an unclean shutdown.
"""

import argparse
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks import common

CHAT = "/v1/chat/completions"
MARKERS = ("<|", "|>", "<turn", "<channel", "<tool_call")


@contextmanager
def served(port: int, *args: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and its address; 0 is any free port."""
    command = [sys.executable, "-m", "mlx_diffgemma.serve", "--port", str(port), "--log-level", "warning", *args]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = next(line for line in process.stderr if line.startswith("http"))
        yield process, line.strip().rstrip("/")
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def body(number: int) -> dict[str, Any]:
    """A request of a few dozen: each comes again and again."""
    prompt = common.PROMPTS[number % len(common.PROMPTS)]
    asked = {"messages": [{"role": "user", "content": prompt}], "seed": number, "max_tokens": (16, 64, 256)[number % 3]}
    return asked | {"diffusion": {"steps": (4, 12, 48)[number // 3 % 3]}}


class Load:
    """What the clients saw."""

    def __init__(self, url: str):
        self.url = url
        self.fates, self.first = Counter[str](), list[float]()
        self.answers: dict[int, str] = {}
        self.faults: list[str] = []
        self._lock = threading.Lock()

    def client(self, number: int, end: float) -> None:
        draw = random.Random(number)
        while time.monotonic() < end:
            which, leaves = draw.randrange(36), draw.random() < 0.2
            try:
                if draw.random() < 0.5:
                    self._stream(which, draw.random() * 2 if leaves else None, drafts=draw.random() < 0.5)
                else:
                    self._whole(which, draw.random() * 2 if leaves else None)
            except httpx.HTTPError as error:
                self._fault(f"{type(error).__name__}: {error}")

    def _whole(self, which: int, patience: float | None) -> None:
        try:
            answer = httpx.post(self.url + CHAT, json=body(which), timeout=patience or 600)
        except httpx.TimeoutException:
            if patience is None:
                raise
            self._count("left")
            return
        if answer.status_code != 200:
            self._fault(f"{answer.status_code}: {answer.text[:200]}")
            return
        self._check(which, answer.json()["choices"][0]["message"]["content"])

    def _stream(self, which: int, patience: float | None, *, drafts: bool) -> None:
        asked = body(which) | {"stream": True}
        if drafts:
            asked["diffusion"] = asked["diffusion"] | {"drafts": "tokens"}
        begun, text, first = time.monotonic(), "", None
        with httpx.stream("POST", self.url + CHAT, json=asked, timeout=600) as response:
            for line in response.iter_lines():
                if patience is not None and time.monotonic() - begun > patience:
                    self._count("left")
                    return
                if line == "data: [DONE]":
                    break
                if line.startswith("data: "):
                    said = "".join(c["delta"].get("content") or "" for c in json.loads(line[6:])["choices"])
                    first = time.monotonic() - begun if said and first is None else first
                    text += said
            else:
                self._fault(f"a stream without an end: {text[:80]!r}")
                return
        with self._lock:
            self.first += [first] if first is not None else []
        self._check(which, text)

    def _check(self, which: int, text: str) -> None:
        with self._lock:
            known = self.answers.setdefault(which, text)
        if text != known:
            self._fault(f"request {which} gave {text[:60]!r} and {known[:60]!r}")
        elif any(marker in text for marker in MARKERS):
            self._fault(f"request {which} has a control token: {text[:80]!r}")
        else:
            self._count("answered")

    def _count(self, fate: str) -> None:
        with self._lock:
            self.fates[fate] += 1

    def _fault(self, message: str) -> None:
        self._count("faults")
        with self._lock:
            self.faults.append(message)


def resident(process: subprocess.Popen[str]) -> int:
    """Bytes in RAM."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def soak(minutes: float, clients: int) -> dict[str, Any]:
    with served(free_port(), "--max-queue", "64") as (process, url):
        load, end = Load(url), time.monotonic() + 60 * minutes
        threads = [threading.Thread(target=load.client, args=(number, end)) for number in range(clients)]
        for thread in threads:
            thread.start()
        memory = []
        while any(thread.is_alive() for thread in threads):
            time.sleep(min(5, 6 * minutes))
            memory.append(resident(process))
        health = httpx.get(url + "/health", timeout=30).json()
        fifth = max(1, len(memory) // 5)
        load.first.sort()
        return {
            "fates": dict(load.fates),
            "faults": load.faults[:5],
            "left_over": health["running"] + health["queued"],
            "resident_megabytes": [
                statistics.median(part) / 1e6 for part in (memory[fifth : 2 * fifth], memory[-fifth:])
            ],
            "first_text_seconds": {
                "median": statistics.median(load.first),
                "95th": load.first[len(load.first) * 95 // 100],
            },
        }


def shutdowns(count: int) -> list[int]:
    """Status of each, ended in mid-stream; then a kill, and a start on the same port."""
    statuses = []
    for number in range(count):
        with served(free_port()) as (process, url):
            asked = body(4) | {"stream": True, "max_tokens": 1000, "diffusion": {"drafts": "text"}}
            with httpx.stream("POST", url + CHAT, json=asked, timeout=60) as response:
                lines = response.iter_lines()
                for _ in range(3 + number % 5):
                    next(lines)
                process.send_signal((signal.SIGTERM, signal.SIGINT)[number % 2])
                try:
                    for _ in lines:
                        pass
                except httpx.HTTPError:
                    pass
            statuses.append(process.wait(60))
    port = free_port()
    with served(port) as (process, url):
        process.kill()
    with served(port) as (_, url):
        assert httpx.post(url + CHAT, json=body(0), timeout=60).status_code == 200
    return statuses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--shutdowns", type=int, default=20)
    parser.add_argument("--allow", type=float, default=50, metavar="MB")
    options = parser.parse_args()
    found = soak(options.minutes, options.clients)
    print(f"{found['fates']}, left over {found['left_over']}, faults: {found['faults']}")
    early, late = found["resident_megabytes"]
    print(f"resident {early:.0f} → {late:.0f} MB; first text {found['first_text_seconds']}")
    statuses = shutdowns(options.shutdowns)
    print(f"shutdowns with status 0: {statuses.count(0)} of {len(statuses)}; killed, it started again")
    print(json.dumps({"provenance": common.provenance(), **found, "shutdowns": statuses}))
    good = not found["faults"] and not found["left_over"] and late - early <= options.allow and not any(statuses)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
