"""`mlx_diffgemma.serve`: an OpenAI server, and a page with the live canvas."""

import asyncio
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli import command
from .disk import reason
from .errors import ConfigError, DiffGemmaError
from .options import Option, model_options, open_model

if TYPE_CHECKING:
    import uvicorn

    from .server.guard import Rules
    from .server.scheduler import Scheduler
    from .text.pictures.sources import Access

LEVELS = ("debug", "info", "warning", "error")
PATIENCE = 5  # seconds that a stream has for its last words when the server stops


@command("serve", machines="share")
@model_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others need --api-key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any free one.")
@click.option("--api-key", envvar="MLX_DIFFGEMMA_API_KEY", metavar="KEY", help="What clients must send.")
@click.option("--max-tokens", type=click.IntRange(1), metavar="N", help="The most tokens of an answer.")
@click.option("--parallel", type=click.IntRange(1), default=2, show_default=True, help="Requests that take turns.")
@click.option("--max-queue", type=click.IntRange(1), default=32, show_default=True, help="Requests that may wait.")
@click.option(
    "--prompt-cache-bytes",
    cls=Option,
    section="Server",
    type=click.IntRange(0),
    metavar="N",
    help="For prefixes of earlier requests.  [default: a quarter of what the model leaves]",
)
@click.option(
    "--allowed-origins",
    cls=Option,
    section="Server",
    multiple=True,
    metavar="URL",
    help="A page elsewhere that may ask, as https://example.org; may be repeated.",
)
@click.option(
    "--allow-image-urls",
    cls=Option,
    section="Server",
    is_flag=True,
    help="Fetch pictures that requests name by http(s) URLs, from this machine's network.",
)
@click.option(
    "--log-level",
    cls=Option,
    section="Server",
    type=click.Choice(LEVELS),
    default="info",
    show_default=True,
    help="info: a line a request.",
)
def main(source: dict[str, Any], host: str, port: int, log_level: str, **wanted: Any) -> None:
    """Serve the model: OpenAI's API under /v1, and a page to watch it at /."""
    _check_installed()
    from .server.scheduler import Scheduler
    from .text.pictures.sources import Access

    rules = _rules(host, wanted["api_key"], wanted["allowed_origins"])
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    with _listening(host, port) as listener:
        scheduler = Scheduler(
            lambda: open_model(source),
            parallel=wanted["parallel"],
            most_queued=wanted["max_queue"],
            most_tokens=wanted["max_tokens"],
            cache_bytes=wanted["prompt_cache_bytes"],
        )
        scheduler.start()
        click.echo(f"http://{host if ':' not in host else f'[{host}]'}:{listener.getsockname()[1]}/", err=True)
        access = Access(files=False, urls=wanted["allow_image_urls"])
        _serve(scheduler, scheduler.served(_name(source.get("model"))), rules, access, listener)


def _check_installed() -> None:
    """Errors: DiffGemmaError where the extra is missing."""
    for name in ("starlette", "uvicorn"):
        if find_spec(name) is None:
            raise DiffGemmaError(f"serve needs {name}: pip install 'mlx-diffgemma[server]'.")


def _rules(host: str, key: str | None, origins: tuple[str, ...]) -> "Rules":
    """Errors: ConfigError for a server that anybody could use."""
    from .server.guard import LOOPBACK, Rules

    if host not in LOOPBACK and not key:
        raise ConfigError(f"--host {host} lets other machines in: give an --api-key that they must send.")
    for origin in origins:
        if origin.count("/") != 2 or "://" not in origin:
            raise ConfigError(f"--allowed-origins {origin}: expected a scheme and a name, as in https://example.org.")
    return Rules(key=key or None, hosts=LOOPBACK if host in LOOPBACK else None, origins=frozenset(origins))


def _name(model: str | None) -> str:
    """What clients call the model: a repository's name, or a folder's last part."""
    if model is None:
        return "built-in"
    return Path(model).resolve().name if Path(model).is_dir() else model


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """Errors: DiffGemmaError for an address that cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise DiffGemmaError(f"--host {host} --port {port} cannot be listened on: {reason(error)}.") from None
    with listener:
        yield listener


def _serve(scheduler: "Scheduler", served: Any, rules: "Rules", access: "Access", listener: socket.socket) -> None:
    """Until a signal comes. The model's thread stops first: streams then have an end to send."""
    import uvicorn

    from .server.app import app

    config = uvicorn.Config(
        app(scheduler, served, rules, access),
        log_level="error",
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=PATIENCE,
    )
    server = uvicorn.Server(config)
    with _stopped_by_signals(server, scheduler):
        asyncio.run(_run(server, listener))
    scheduler.stop()
    scheduler.join()


async def _run(server: "uvicorn.Server", listener: socket.socket) -> None:
    await server.serve(sockets=[listener])


@contextmanager
def _stopped_by_signals(server: "uvicorn.Server", scheduler: "Scheduler") -> Iterator[None]:
    """SIGINT and SIGTERM end the server with status 0. uvicorn would send itself the signal once more."""

    @contextmanager
    def capture() -> Iterator[None]:
        yield

    def stop(number: int, frame: Any) -> None:
        scheduler.stop()
        server.handle_exit(number, frame)

    server.capture_signals = capture  # type: ignore[method-assign]
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
