"""Arguments of the kernels in ``native/step_kernels.h``, and where their code comes from."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagd.errors import DependencyError

if TYPE_CHECKING:
    from numpy.typing import NDArray

ADVANCE, SAMPLE, APPEND = KERNELS = "diagd_advance", "diagd_sample", "diagd_append"
HEADER_WORDS = 18
CHUNK_BYTES = 16
SOURCE_NAME, PTX_NAME = "step_kernels.cu", "step_kernels.ptx"
ATTENTION = ("diagd_attend",)
LAYER = ("diagd_norm", "diagd_swiglu", "diagd_gelu", "diagd_embed")
OPERATORS = "diagd_operators"
HOST_NAME = "step_kernels_host"

ADVANCE_POINTERS = ("records", "cursor", "sources", "positions", "write_index", "live", "slot_position")


class AdvanceArguments(ctypes.Structure):
    """The next step's record to the fixed tensors a graph reads."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ADVANCE_POINTERS), ("width", ctypes.c_int32))


class SampleArguments(ctypes.Structure):
    """Logits to tokens, by the record of the step that runs."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("records", "cursor", "logits", "ranges", "token_buffer", "refused")
        ),
        ("prefix", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("frame_length", "vocabulary", "keep_crossing", "width")),
    )


class AppendArguments(ctypes.Structure):
    """New rows to the K/V buffers."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "buffers", "write_index")),
        *((name, ctypes.c_int32) for name in ("tensors", "groups", "capacity", "width", "row_chunks")),
    )


class DrawArguments(ctypes.Structure):
    """Logits of rows to their tokens, on the host."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "low", "high", "positions", "seeds", "tokens")),
        ("stride", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("rows", "top_k")),
        *((name, ctypes.c_float) for name in ("temperature", "top_p")),
        ("keep_crossing", ctypes.c_int32),
    )


class OperatorArguments(ctypes.Structure):
    """What stands between a step's products: kernels, and memory between blocks of attention."""

    _fields_ = (
        ("functions", ctypes.c_void_p * (len(LAYER) + len(ATTENTION))),
        ("between", ctypes.c_void_p),
        ("launch", ctypes.c_void_p),
        ("provider", ctypes.c_char_p),
        *((name, ctypes.c_int32) for name in ("processors", "block_bytes", "size")),
    )


def address(array: NDArray[Any]) -> int:
    """Of an array's first byte; ``array.ctypes`` takes nearly three times as long."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array.data))
    except (TypeError, ValueError):  # it is read-only, empty, not in C order or of no type of NumPy's own
        return array.ctypes.data


@cache
def host_build() -> ctypes.CDLL | None:
    """The host build in the package, put there by an installation with a C++ compiler.

    None without one, and where another system's, as of a checkout that a container shares, cannot be loaded.
    """
    for suffix in EXTENSION_SUFFIXES:
        file = Path(__file__).with_name(HOST_NAME + suffix)
        if file.is_file():
            try:
                kernels = ctypes.CDLL(str(file))
            except OSError:
                return None
            return kernels if fits(kernels) else None
    return None


def fits(kernels: ctypes.CDLL) -> bool:
    """Whether a host build takes the arguments written here; that of a checkout may be of older sources."""
    arguments = {
        ADVANCE: AdvanceArguments,
        SAMPLE: SampleArguments,
        APPEND: AppendArguments,
        "diagd_draw": DrawArguments,
        OPERATORS: OperatorArguments,
    }
    runs = hasattr(kernels, "RegisterCustomOps") and hasattr(kernels, "diagd_packs")
    return runs and all(
        hasattr(kernels, size := f"{name}_arguments_size")
        and getattr(kernels, size)() == ctypes.sizeof(structure)
        for name, structure in arguments.items()
    )


def register_host(settings: Any, threads: int) -> None:
    """Have a session on the processor run functions of a graph by the host build, where there is one."""
    if library := host_build():
        library.diagd_operators_with(ctypes.byref(OperatorArguments(processors=threads)))
        settings.register_custom_ops_library(library._name)


def built_ptx() -> bytes | None:
    """PTX that CMake put into the package; None where none was built."""
    file = Path(__file__).with_name(PTX_NAME)
    return file.read_bytes() if file.is_file() else None


def kernel_source(name: str = SOURCE_NAME) -> tuple[str, dict[str, str]]:
    """Text of kernels and of all headers by name, in the package or in the checkout around it.

    DependencyError where they are in neither.
    """
    here = Path(__file__).parent
    for directory in (here, here.parents[2] / "native"):
        if (directory / name).is_file():
            texts = {file.name: file.read_text(encoding="utf-8") for file in directory.glob("*.h")}
            return (directory / name).read_text(encoding="utf-8"), texts
    raise DependencyError(
        f"the device kernels are neither built nor at hand: {here} has no {PTX_NAME} and no {name}; "
        "in a checkout run: cmake -B build -DDIAGD_INSTALL_KERNELS=ON && cmake --build build"
    )


def compile_attention(architecture: int, head_size: int) -> bytes:
    """Machine code of the attention over heads of a size; see ``compile_kernels``."""
    return _compiled("attention.cu", architecture, f"-DHEAD_SIZE={head_size}")


def compile_layer(architecture: int) -> bytes:
    """Machine code of what else stands between the products of a layer; see ``compile_kernels``."""
    return _compiled("layer.cu", architecture)


def compile_kernels(architecture: int) -> bytes:
    """Machine code of the kernels by NVRTC, for a compute capability such as 90; needs no GPU.

    Not PTX: a driver refuses the PTX of an NVRTC newer than itself, but runs machine code of its CUDA's major
    version (CUDA Compatibility, "Minor Version Compatibility"). DependencyError where NVRTC is not installed,
    EngineError where it refuses the source.
    """
    # The sampler rounds products before it adds them, as NumPy does.
    return _compiled(SOURCE_NAME, architecture, "--fmad=false")


def _compiled(name: str, architecture: int, *further: str) -> bytes:
    from diagd.engines.devices.cuda import check
    from diagd.errors import EngineError, require

    nvrtc = require("cuda.bindings.nvrtc", extra="cuda", purpose="compile the device kernels")
    source, headers = kernel_source(name)
    names, texts = [file.encode() for file in headers], [text.encode() for text in headers.values()]
    try:
        program = check(
            nvrtc.nvrtcCreateProgram(source.encode(), SOURCE_NAME.encode(), len(names), texts, names)
        )
    except RuntimeError as error:
        raise DependencyError(
            f"NVRTC cannot be loaded: {error}; run: pip install nvidia-cuda-nvrtc"
        ) from error
    options = [f"--gpu-architecture=sm_{architecture}".encode(), b"--std=c++17"]
    options += [option.encode() for option in further]
    outcome = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(outcome[0]) != 0:
        log = bytes(check(nvrtc.nvrtcGetProgramLogSize(program)))
        check(nvrtc.nvrtcGetProgramLog(program, log))
        raise EngineError(f"NVRTC refuses the device kernels: {log.decode().strip()}")
    code = bytes(check(nvrtc.nvrtcGetCUBINSize(program)))
    check(nvrtc.nvrtcGetCUBIN(program, code))
    return code
