"""Where a profile runs: the processor, or a GPU through one of its backends."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

from diagd.bundle import Bundle
from diagd.engines.cuda.device import Device
from diagd.engines.cuda.driver import CudaDevice, describe_device, open_driver
from diagd.engines.cuda.engine import DeviceEngine
from diagd.engines.gpu import BACKENDS, open_gpu_engine
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import UsageError, unknown
from diagd.planning.ceilings import Ceilings, measure_ceilings
from diagd.planning.device_ceilings import (
    COPY_BYTES,
    SIDE,
    MakeProduct,
    measure_device_ceilings,
    product_maker,
)
from diagd.profiling.engines import check_window, find_form, open_engine, session_over
from diagd.runtime.load import open_session
from diagd.runtime.session import Session, token_places

CPU: Final = "cpu"


class Target(Protocol):
    """Measures its own limits and opens sessions.

    ``description`` names the device, '' for the processor.
    """

    @property
    def description(self) -> str:
        """The device's name and driver."""
        ...

    def ceilings(self) -> Ceilings:
        """Its limits, measured now."""
        ...

    def open(self, bundle: Bundle, window: int | None) -> Session:
        """A session over the graphs of a bundle."""
        ...


@dataclass(frozen=True)
class ProcessorTarget:
    """ONNX Runtime's CPU provider; ``form`` of the step graph, default: what ``open_session`` takes."""

    cpu: CpuOptions
    form: str | None = None
    description: str = ""

    def ceilings(self) -> Ceilings:
        """See ``Target``."""
        return measure_ceilings(self.cpu.threads)

    def open(self, bundle: Bundle, window: int | None) -> Session:
        """See ``Target``."""
        if self.form is None:
            return open_session(bundle, window=window, cpu=self.cpu)
        form, window = find_form(bundle, self.form), check_window(bundle, window)
        return session_over(bundle, open_engine(bundle, form, window, self.cpu), window, self.cpu)


@dataclass(frozen=True)
class DeviceTarget:
    """Engines on a device.

    Attributes:
        description: of the device.
        cpu: for what runs on the processor all the same.
        make_device: the device without an engine, to measure its limits.
        make_engine: from a bundle, the size of the token buffer, and whether graphs are replayed.
        make_product: a matrix product by the backend's own library.
        side, copied: sizes of the product and the copy.
    """

    description: str
    cpu: CpuOptions
    make_device: Callable[[], Device]
    make_engine: Callable[[Bundle, int, bool], DeviceEngine]
    make_product: Callable[[Device], MakeProduct]
    side: int = SIDE
    copied: int = COPY_BYTES

    def ceilings(self) -> Ceilings:
        """See ``Target``."""
        with closing(self.make_device()) as device:
            return measure_device_ceilings(device, self.make_product(device), self.side, self.copied)

    def open(self, bundle: Bundle, window: int | None, *, graphs: bool = True) -> Session:
        """See ``Target``; ``graphs``: replay graphs of the device."""
        manifest, window = bundle.manifest, check_window(bundle, window)
        places = token_places(manifest.layout, manifest.context.frames).size
        return session_over(bundle, self.make_engine(bundle, places, graphs), window, self.cpu)


def find_target(backend: str, form: str | None, cpu: CpuOptions) -> ProcessorTarget | DeviceTarget:
    """The target of a backend: ``cpu``, ``cuda``, ``tensorrt`` or ``tensorrt_rtx``.

    Raises:
        UsageError: there is no such backend, or a form is named for a GPU.
        EngineError: there is no GPU.
        DependencyError: a package is missing.
    """
    if backend == CPU:
        return ProcessorTarget(cpu, form)
    if backend not in BACKENDS:
        raise unknown("backend", backend, (CPU, *BACKENDS))
    if form is not None:
        raise UsageError(f"engine={form} is a form on the CPU; backend={backend} takes the one that suits it")
    return gpu_target(backend, cpu)


def gpu_target(backend: str, cpu: CpuOptions) -> DeviceTarget:
    """The first GPU through one of its backends; see ``find_target``."""
    described = describe_device(open_driver())
    return DeviceTarget(
        f"{described.name}, driver {described.driver}, {backend}",
        cpu,
        CudaDevice,
        lambda bundle, tokens, graphs: open_gpu_engine(bundle, tokens, backend, graphs=graphs),
        partial(product_maker, backend),
    )
