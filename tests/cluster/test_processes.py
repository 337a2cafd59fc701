"""The same results by any number of workers, killed ones included."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from diagd.cluster.workers import Here, Processes
from diagd.errors import UsageError
from tests.cluster.pool_work import sizes, squares


def test_workers_give_what_one_gives_though_one_is_killed(tmp_path: Path) -> None:
    with Here(partial(squares, tmp_path)) as here:
        expected = dict(here.map([0, 1, 2]))
    assert expected == {0: 0, 1: 1, 2: 4}
    with Processes(partial(squares, tmp_path), 2) as workers:
        assert dict(workers.map([0, 1, 2])) == expected
        assert dict(workers.map(range(6))) == {number: number**2 for number in range(6)}
        assert (tmp_path / "3").exists()  # it was killed there, once
        with pytest.raises(UsageError, match="-1 is negative"):
            list(workers.map([-1]))
        assert dict(workers.map([7])) == {0: 49}
        with pytest.raises(UsageError, match="use fewer than 2 --workers"):
            list(workers.map([13]))


def test_a_worker_is_killed_while_much_is_written_to_it(tmp_path: Path) -> None:
    with Processes(partial(sizes, tmp_path), 2) as workers:
        assert dict(workers.map([b"0" * (1 << 22)] * 8)) == dict.fromkeys(range(8), 1 << 22)
        assert (tmp_path / "killed").exists()
        with pytest.raises(UsageError, match="3 workers were killed"):
            list(workers.map([b"1" * (1 << 22)] * 8))


def test_a_worker_gets_ready_once(tmp_path: Path) -> None:
    with Processes(partial(squares, tmp_path), 1) as workers:
        for _ in range(3):
            list(workers.map([1, 2]))
    assert len(list(tmp_path.glob("ready-*"))) == 1


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="needs masks of signals")
def test_workers_that_are_interrupted_while_they_start_say_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code = "import os, signal, multiprocessing\n\ndef make():\n    return abs\n\n"
    code += "if multiprocessing.current_process().name != 'MainProcess':\n"
    code += "    os.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / "interrupted.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    make = importlib.import_module("interrupted").make
    with pytest.raises(UsageError, match="3 workers were killed"), Processes(make, 1) as workers:
        list(workers.map([1]))
    assert capfd.readouterr().err == ""


def test_workers_end_with_whoever_began_them(tmp_path: Path) -> None:
    """However it ended: a pool whose owner is killed would wait for work for ever."""
    code = "import time\nwith Processes(partial(squares, Path(sys.argv[1])), 1) as workers:\n"
    code += "    print(list(workers.map([1])), flush=True)\n    time.sleep(60)\n"
    begin = "import sys\nfrom functools import partial\nfrom pathlib import Path\n"
    begin += "from diagd.cluster.workers import Processes\nfrom tests.cluster.pool_work import squares\n"
    command = [sys.executable, "-c", begin + code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "[(0, 1)]\n"
        owner.kill()
        assert owner.stdout.read() == ""  # which the worker has open too, as long as it lives
