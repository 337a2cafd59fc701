"""Every run has a machine cache of its own, and small models run on one thread, which is fastest.

What fixtures need is imported by them: the process that only hands tests to others starts these sooner.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from diagd.bundle import Bundle
    from tests.play.browser import Tab

DAY = 86_400.0

settings.register_profile(  # any run of the same sources tests the same examples, however long they take
    "any machine", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


def pytest_collection_finish() -> None:
    """Modules and tests stay: no collection of garbage looks through them again; and fewer do."""
    gc.freeze()
    gc.set_threshold(100_000)


if sys.version_info < (3, 11):  # whose last ONNX Runtime is 1.23

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup() -> Generator[None, object, object]:
        return (yield from _as_told())

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call() -> Generator[None, object, object]:
        return (yield from _as_told())


def _as_told() -> Generator[None, object, object]:
    """What needs a later ONNX Runtime says so, and is not tested further."""
    from diagd.engines.onnxruntime_session import LATER, NEWER

    try:
        return (yield)
    except Exception as error:  # of ONNX Runtime itself too
        if not any(told in str(error) for told in (NEWER, *LATER)):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session", autouse=True)
def _machine_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Workers, and runs of the same sources, share graphs alone: none is told that another fills an entry."""
    from diagd.export.known_graphs import KIND
    from tests.models import KEPT

    folder = tmp_path_factory.mktemp("cache")
    (KEPT / KIND).mkdir(parents=True, exist_ok=True)
    for graph in (KEPT / KIND).iterdir():
        with contextlib.suppress(FileNotFoundError):  # the other worker was first
            if time.time() - graph.stat().st_mtime > DAY:  # of sources that are no more
                graph.unlink()
    (folder / KIND).symlink_to(KEPT / KIND)
    os.environ["DIAGD_CACHE"] = str(folder)


@pytest.fixture(scope="session")
def small_wham(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A WHAM of pictures of 18 x 30 pixels, 3 x 5 tokens, that sees 4 frames."""
    import torch

    from diagd.bundle import Bundle
    from diagd.export.checkpoints import open_checkpoint
    from diagd.export.exporter import Sources, export, random_sources
    from diagd.export.families import wham
    from diagd.export.options import GraphOptions
    from tests.export.released import random_tensors

    pixels = wham.WhamVitConfig(
        height=18, width=30, patch=6, hidden=16, layers=1, head_size=8, code_width=4, codes=64
    )
    config = wham.transformer_config(grid=(3, 5), codes=64, frames=4, hidden=32, layers=1, heads=2, bias=True)
    family = wham.family("small-wham", wham.Variant(config, norm_weights=True, tokenizer=pixels))
    folder = tmp_path_factory.mktemp("wham")
    torch.save({"state_dict": random_tensors(family.expected)}, folder / "wham.ckpt")
    weights = open_checkpoint(str(folder / "wham.ckpt"))
    sources = Sources(weights, random_sources(family, 0).tokenizer)
    return Bundle.open(export(family, GraphOptions(), sources, folder / "wham.diagd").path)


@pytest.fixture(scope="session", autouse=True)
def _signals() -> None:
    """As in a terminal: ``nohup`` and ``&`` have Ctrl-C ignored, and what tests start inherits it."""
    for name, usual in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        if (number := getattr(signal, name, None)) and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    from tests.play.browser import CHROMIUM, browser

    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with browser(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


@pytest.fixture(scope="module")
def tab(chromium: Tab) -> Iterator[Tab]:
    """A browser's tab, whose page goes when the module's tests are done: one that plays keeps a core busy."""
    yield chromium
    chromium.open("about:blank")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of 4 x 6 tokens, 16 x 24 pixels, with three pictures to start from."""
    import numpy as np

    from diagd.cli.main import main
    from diagd.play.pictures import png
    from tests.worlds import random_world

    folder = tmp_path_factory.mktemp("play")
    trained, bundle = random_world(folder / "trained", rows=4, columns=6, size="0.7m"), folder / "world.diagd"
    assert main(["export", "--model", "world", "--checkpoint", str(trained), "--output", str(bundle)]) == 0
    (bundle / "prompts").mkdir()
    random = np.random.default_rng(0)
    for number in range(3):
        picture = random.integers(0, 256, (16, 24, 3), dtype=np.uint8)
        (bundle / "prompts" / f"{number}.png").write_bytes(png(picture))
    return bundle
