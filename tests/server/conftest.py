"""One server a file, of a scripted model; files with a model of their own have a `server` of their own."""

from collections.abc import Iterator

import pytest

from tests.server.scripted import Scripted
from tests.server.serving import Running, serving


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Scripted:
    return Scripted(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(model: Scripted) -> Iterator[Running]:
    with serving(model) as running:
        yield running
