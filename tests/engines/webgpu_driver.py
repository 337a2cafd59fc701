"""WebGPU over a software driver, in a process of its own: it is told to the provider when that is loaded."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

DRIVERS = (
    Path("/usr/lib/chromium/vk_swiftshader_icd.json"),
    Path("/opt/google/chrome/vk_swiftshader_icd.json"),
)
"""SwiftShader comes with Chromium; the provider refuses the lavapipe of Debian 12."""

DECODE = """
import json, sys
from dataclasses import asdict
import numpy as np
from diagd.bundle import Bundle
from diagd.engines.tensors import rotate_pairs
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.profiling.measure import random_workload
from diagd.profiling.verify import candidates, open_reference, verify
from diagd.runtime.decoders import JacobiDecoder
from diagd.runtime.load import open_session
from diagd.schedule import Schedule

def played(session):
    # frames up to one behind the first time that cached keys are turned back
    load, found = random_workload(session, 1, 40), []
    session.start(load.prompt, load.prompt_actions, load.text)
    frames = session.frames(JacobiDecoder(24), load.actions)
    while session._slots.base == 0:
        found.append(next(frames).tokens.tolist())
    return [*found, next(frames).tokens.tolist()]

bundle, precision = Bundle.open(sys.argv[1]), sys.argv[2]
for candidate in candidates(bundle.at_precision(precision), "webgpu", 3, CpuOptions(1)):
    session, order = candidate.session, Schedule.serial(bundle.manifest.layout, 1)
    with open_reference(bundle, session) as plain:
        workload = random_workload(session, 1, 1)
        verdict = verify(session, plain, candidate.name, candidate.precision, order, workload, 1)
    found = asdict(verdict)
    if sys.argv[3:]:
        with open_session(bundle, window=3, cpu=CpuOptions(1)) as here:
            found |= {"frames": played(session), "here": played(here)}
    values = session.engine._values
    before = {name: value.numpy() for name, value in values.items()}
    angles, live = np.linspace(0.1, 0.9, before["key_0"].shape[-1] // 2), 30
    session.engine.rotate_keys(angles, live)
    for name in filter(lambda name: name.startswith("key"), before):
        rotate_pairs(before[name][:live], angles)
    turned = max(float(np.abs(before[name] - value.numpy()).max()) for name, value in values.items())
    print(json.dumps(found | {"turned": turned}))
"""


OPEN = """
import json, sys
from diagd.bundle import Bundle
from diagd.engines.onnxruntime_session import nodes_outside
from diagd.engines.gpu import PROVIDER, WebGpuEngine

engine = WebGpuEngine(Bundle.open(sys.argv[1]).at_precision(sys.argv[2]), 96, 64)
print(json.dumps(nodes_outside(engine._session, PROVIDER)))
"""


def driver() -> Path:
    """A software driver of Vulkan, or a skip."""
    if find_spec("onnxruntime_ep_webgpu") is None:
        pytest.skip("onnxruntime-ep-webgpu is not installed")
    try:
        ctypes.CDLL("libvulkan.so.1")
    except OSError:
        pytest.skip("libvulkan.so.1 is not installed (Debian: libvulkan1)")
    if (found := next(filter(Path.is_file, DRIVERS), None)) is None:
        pytest.skip("no software Vulkan driver: SwiftShader comes with Chromium")
    return found


def decoded(bundle: Path, precision: str, *further: str) -> dict[str, Any]:
    """The verdict on a frame, and how far keys that were turned are off.

    With ``"play"``, ``frames`` up to one behind the first turn of a full window, and those of the processor.
    """
    verdict: dict[str, Any] = _answer(DECODE, bundle, precision, *further)
    return verdict


def nodes_on_the_processor(bundle: Path, precision: str) -> list[str]:
    """As ``operator (name)``, of a step graph that the provider took."""
    nodes: list[str] = _answer(OPEN, bundle, precision)
    return nodes


def _answer(code: str, bundle: Path, precision: str, *further: str) -> Any:
    surroundings = {"ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER": "1", "VK_ICD_FILENAMES": str(driver())}
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle), precision, *further],
        env=os.environ | surroundings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
