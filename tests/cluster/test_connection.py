from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.util import find_spec

import pytest


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_named_and_nothing_is_told() -> None:
    if find_spec("ray") is None:  # importing it here would fix its settings for the clusters of other tests
        pytest.skip("pip install 'diagd[cluster]'")
    code = """
import os
from diagd.cluster.connection import connect
from diagd.errors import UsageError
try:
    connect("127.0.0.1:1")
except UsageError as error:
    print(os.environ["RAY_USAGE_STATS_ENABLED"], os.environ["RAY_AUTH_MODE"], error)
"""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    found = subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True, check=True)
    assert found.stdout.startswith("0 token cannot join a Ray cluster at 127.0.0.1:1")
    assert "ray start --head" in found.stdout


@pytest.mark.slow
def test_a_cluster_of_this_machine_listens_on_it_alone() -> None:
    if find_spec("ray") is None:
        pytest.skip("pip install 'diagd[cluster]'")
    code = """
from pathlib import Path
from diagd.cluster.connection import HERE, connect
def listening():
    lines = [*Path("/proc/net/tcp").open(), *Path("/proc/net/tcp6").open()]
    rows = [line.split() for line in lines]
    return {row[1] for row in rows if row[3] == "0A"}
before = listening()
connect(HERE).put(0)
print(*listening() - before)
"""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    found = subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True, check=True)
    hosts = {address.partition(":")[0] for address in found.stdout.split()}
    assert hosts
    assert all(host.endswith("0100007F") for host in hosts), hosts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_cluster_that_is_interrupted_as_it_starts_ends_when_it_has_begun(name: str) -> None:
    if find_spec("ray") is None:
        pytest.skip("pip install 'diagd[cluster]'")
    code = f"""
import os, signal, sys
from diagd.cli.main import main
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="token")
import ray
begin = ray.init
def interrupted(*where, **told):
    os.kill(os.getpid(), signal.{name})
    begin(*where, **told)
    print("begun")
ray.init = interrupted
sys.exit(main(["world", "collect", "nothing", "--cluster", "local"]))
"""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    found = subprocess.run(
        [sys.executable, "-c", code], env=kept, capture_output=True, text=True, check=False
    )
    expected = 128 + getattr(signal, name), "begun\n", "interrupted\n"
    assert (found.returncode, found.stdout, found.stderr) == expected
