"""Pages over a small world, and one over the shipped model; the runtime is fetched once a run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from diagd.bundle import Bundle
from diagd.errors import DependencyError
from diagd.progress import Progress
from diagd.web.folder import runtime_files, server, write_page

Serve = Callable[[Path], AbstractContextManager[str]]


@pytest.fixture(scope="session")
def runtime() -> dict[str, bytes]:
    try:
        return runtime_files(None, Progress())
    except DependencyError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def page(world: Path, runtime: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of the small world, which has fp32 alone."""
    return write_page(Bundle.open(world), tmp_path_factory.mktemp("web") / "page", lambda: runtime).path


@pytest.fixture(scope="session")
def serve() -> Serve:
    """Serves a folder in a thread of its own; gives the address."""

    @contextmanager
    def serving(folder: Path) -> Iterator[str]:
        with server(folder, 0) as served:
            thread = threading.Thread(target=served.serve_forever)
            thread.start()
            try:
                yield f"http://127.0.0.1:{served.server_port}/"
            finally:
                served.shutdown()
                thread.join()

    return serving
