"""The same results by any number of workers, killed ones included."""

from __future__ import annotations

import importlib
import multiprocessing
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from diagd.cluster.workers import Here, Processes
from diagd.errors import UsageError
from tests.cluster.pool_work import sizes, sleeps, squares


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


@pytest.mark.parametrize("after", [0.0, 0.002, 0.01, 0.03, 0.1, 0.2])
def test_a_worker_is_killed_while_others_start(after: float, tmp_path: Path) -> None:
    def kill() -> None:
        while not (workers := multiprocessing.active_children()):
            time.sleep(0.0005)
        time.sleep(after)
        for worker in workers:
            worker.kill()

    with Processes(partial(squares, tmp_path), 4) as workers:
        killer = threading.Thread(target=kill)
        killer.start()
        assert dict(workers.map([4, 5, 6, 7, 8])) == {0: 16, 1: 25, 2: 36, 3: 49, 4: 64}
        killer.join()


def test_one_that_is_busy_with_an_earlier_call_answers_no_later_one(tmp_path: Path) -> None:
    with Processes(partial(squares, tmp_path), 2) as workers:
        for results in (workers.map(range(4, 10)), workers.map(range(10, 13))):
            next(results)
            results.close()
        assert dict(workers.map([5, 4, 6])) == {0: 25, 1: 16, 2: 36}


def test_what_is_done_for_nobody_keeps_nobody_waiting() -> None:
    with pytest.raises(KeyboardInterrupt), Processes(sleeps, 2) as workers:
        assert next(workers.map([10_000, 0, 0])) == (1, 0)
        raise KeyboardInterrupt
    assert not multiprocessing.active_children()


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
    anew = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nfrom interrupted import make\n"
    anew += "from diagd.cluster.workers import Processes\n"
    anew += "with Processes(make, 1) as workers:\n    list(workers.map([1]))\n"
    first = subprocess.run([sys.executable, "-c", anew], capture_output=True, text=True, check=False)
    assert "KeyboardInterrupt" not in first.stderr
    assert "3 workers were killed" in first.stderr


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
