"""Nodes that ONNX Runtime's CUDA provider runs, and launches a step, on a machine without a GPU.

    python -m benchmarks.partition --folder /tmp/partition
    python -m benchmarks.partition --folder /tmp/partition --bundle cosmos-4b.diagd

The real package is loaded over libraries that stand in for CUDA's (cuda_stub.c): which nodes it takes, what
it copies, whether it captures a step as a graph and what is in that graph are its own code; kernels are
counted, not run. Without ``--bundle`` each family at its released widths, two layers deep, with random
weights in float16, is exported to the folder once, for one stream and for two. Downloads the package (256 MB)
from the index with pip; needs a C compiler and nm.

Ends with 1 where a node is left to the processor, or a step waits, allocates or cannot be captured.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks import parser
from diagd.bundle import Bundle, Form
from diagd.engines.backend import forms_of, graphs_of
from diagd.engines.devices.host import HostDevice
from diagd.engines.gpu import step_operators
from diagd.engines.onnxruntime_session import OnnxRuntimeProgram, open_cuda_session
from diagd.engines.tensors import StepTensors
from diagd.errors import DiagdError
from diagd.export.exporter import export, random_sources
from diagd.export.families import Family, cosmos, find, mineworld, wham
from diagd.export.options import GraphOptions

PACKAGES = ("onnxruntime-gpu==1.31.1", "nvidia-cuda-runtime>=13,<14", "nvidia-cuda-crt>=13,<14")
PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
STUBS = ("libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13", "libcurand.so.10", "libcuda.so.1")
FORMS = (Form.MODERN, Form.PORTABLE)
WIDTHS = (1, 16, 64)
STREAMS = (1, 2)
FAULTS = ("captured allocation", "captured wait", "captured waiting copy")
"""Calls that keep a step from being one launch."""

HEADER = ("graph", "width", "kernels", "products", "copies", "clears", "faults")
SOURCE = Path(__file__).with_name("cuda_stub.c")
INSIDE = "DIAGD_STUB_LOG"


@dataclass(frozen=True)
class Step:
    """What one width of a step graph does: calls by kind, as the provider made them."""

    graph: str
    width: int
    captured: Counter[str]
    replayed: Counter[str]

    @property
    def faults(self) -> int:
        """Calls that a graph cannot hold, and a replay that is more than a launch."""
        return sum(self.captured[fault] for fault in FAULTS) + (self.replayed != Counter(graph=1))

    def row(self) -> tuple[object, ...]:
        kinds = ("kernel", "product", "copy", "clear")
        return (self.graph, self.width, *(self.captured[f"captured {kind}"] for kind in kinds), self.faults)


def main() -> int:
    args = arguments().parse_args()
    if INSIDE in os.environ:
        return look(args.bundle)
    args.folder.mkdir(parents=True, exist_ok=True)
    site = install(args.folder)
    stubs = build_stubs(site, args.folder / "stubs")
    bundles = args.bundle or [
        exported(family, args.folder, streams)
        for family in families()
        for streams in ((1,) if family.transformer.text else STREAMS)
    ]
    paths = (site, Path(__file__).parents[1])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "LD_LIBRARY_PATH": str(stubs),
        INSIDE: str(args.folder / "calls.log"),
    }
    command = [sys.executable, "-m", "benchmarks.partition", "--folder", str(args.folder)]
    for bundle in bundles:
        command += ["--bundle", str(bundle)]
    return subprocess.run(command, check=False, env=environment).returncode


def arguments() -> argparse.ArgumentParser:
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, required=True, help="packages and bundles are kept here")
    options.add_argument("--bundle", type=Path, action="append", help="look at this one; may be repeated")
    return options


def install(folder: Path) -> Path:
    """The packages unpacked side by side; downloaded once."""
    site, wheels = folder / "site", folder / "wheels"
    if not (site / PROVIDER).is_file():
        print("downloading", *PACKAGES, flush=True)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels), *PACKAGES]
        subprocess.run(pip, check=True)
        for wheel in wheels.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                # not the libraries of CUDA that come with its headers
                archive.extractall(site, [name for name in archive.namelist() if "/lib/" not in name])
    return site


def build_stubs(site: Path, folder: Path) -> Path:
    """Shared libraries of the names and versions that the provider links against."""
    folder.mkdir(exist_ok=True)
    wanted = linked_names(site / PROVIDER)
    headers = next(site.glob("nvidia/*/include"))
    for library in STUBS:
        names = wanted[library]
        products = [] if library == "libcudart.so.13" else ["-DPRODUCTS"]
        written = folder / f"{library}.o"
        compile_c("-c", *products, f"-I{headers}", str(SOURCE), "-o", str(written))
        defined = run("nm", "--defined-only", "--format=posix", str(written)).splitlines()
        there = {line.split()[0] for line in defined}
        zeros, script = folder / f"{library}.c", folder / f"{library}.map"
        zeros.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(names - there)))
        exported_names = "; ".join(sorted({*names, "diagd_note", "cuLaunchKernel"}))
        version = library if library != "libcuda.so.1" else ""
        script.write_text(f"{version} {{ global: {exported_names}; local: *; }};\n")
        cudart = [] if library == "libcudart.so.13" else [str(folder / "libcudart.so.13")]
        link = ["-shared", f"-Wl,-soname,{library}", f"-Wl,--version-script,{script}"]
        compile_c(*link, str(written), str(zeros), *cudart, "-o", str(folder / library))
    return folder


def linked_names(library: Path) -> dict[str, set[str]]:
    """Functions that a shared library expects, by the library (or version) it expects them of."""
    names = defaultdict[str, set[str]](set)
    for line in run("nm", "-D", "--undefined-only", str(library)).splitlines():
        name, _, version = line.split()[-1].partition("@")
        if not version and name.startswith("cu"):
            version = "libcuda.so.1"
        names[version].add(name)
    return names


def compile_c(*arguments: str) -> None:
    run("cc", "-std=gnu11", "-O1", "-fPIC", "-fno-builtin", "-Wno-deprecated-declarations", *arguments)


def run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def families() -> list[Family]:
    """Each family at its released widths, two layers deep; and the world that is shipped."""
    big, game = cosmos.build("cosmos-4b").transformer, mineworld.build("mineworld-300m").transformer
    texts = cosmos.build("cosmos-5b-video2world").transformer
    play = wham.build("wham-200m").transformer
    variant = wham.Variant(replace(play, layers=2), norm_weights=True, tokenizer=None)
    return [
        find("crafter-3m"),
        mineworld.family("mineworld", replace(game, layers=2)),
        wham.family("wham", variant),
        cosmos.family("cosmos", replace(big, layers=2)),
        cosmos.family("cosmos-text", replace(texts, layers=2)),
    ]


def exported(family: Family, folder: Path, streams: int) -> Path:
    """A bundle of random weights in float16, made once."""
    path = folder / f"{family.name}{f'-{streams}' if streams > 1 else ''}.diagd"
    if not path.is_dir():
        print("exporting", path.stem, flush=True)
        options = GraphOptions(FORMS, "fp16", WIDTHS, streams=streams)
        export(family, options, random_sources(family, 0), path)
    return path


def look(bundles: list[Path]) -> int:
    """Open every step graph of the bundles strictly, run each width, and print what the provider did."""
    print(("| {} " * len(HEADER) + "|").format(*HEADER), "|---" * len(HEADER) + "|", sep="\n")
    failed = False
    for path in bundles:
        bundle = Bundle.open(path)
        for form in (form for form in forms_of(bundle) if form in FORMS):
            try:
                for step in run_widths(bundle, form):
                    print(("| {} " * len(HEADER) + "|").format(*step.row()), flush=True)
                    failed |= step.faults > 0
            except (DiagdError, RuntimeError) as error:  # ONNX Runtime's own at the first run
                print(f"refused: {bundle.manifest.name}, {form.value}: {error}", flush=True)
                failed = True
    return int(failed)


class StandIn(HostDevice):
    """The H100 that cuda_stub.c tells of; its kernels are counted, not run."""

    architecture, processors, block_bytes = 90, 132, 227 << 10

    def load(self, code: bytes, names: Sequence[str], shared: int = 0) -> dict[str, int]:
        return {name: number + 1 for number, name in enumerate(names)}


def run_widths(bundle: Bundle, form: Form) -> Iterator[Step]:
    """Each width until it is captured, and once more."""
    graphs, device = graphs_of(bundle, form), StandIn()
    widths = tuple(int(graph.width or 0) for graph in graphs)
    streams = graphs[0].streams
    tensors = StepTensors(bundle.manifest, graphs[0], widths[-1], 1024, device, {})
    operators = step_operators(bundle.manifest, graphs[0], device) if form is Form.MODERN else None
    session = open_cuda_session(bundle.file(graphs[0].file), graphs=True, strict=True, operators=operators)
    program = OnnxRuntimeProgram(session, tensors.named, widths, "cuda")
    name = f"{bundle.manifest.name}, {form.value}" + (f", {streams} streams" if streams > 1 else "")
    for width in widths:
        captured = calls_of(partial(program.enqueue, width))
        replayed = calls_of(partial(program.enqueue, width))
        yield Step(name, width, captured, replayed)


def calls_of(action: Callable[[], None]) -> Counter[str]:
    """Calls that the stand-in libraries noted while something ran, by kind."""
    log = Path(os.environ[INSIDE])
    start = log.stat().st_size
    action()
    with log.open() as lines:
        lines.seek(start)
        return Counter(line.split(":", maxsplit=1)[0] for line in lines)


if __name__ == "__main__":
    sys.exit(main())
