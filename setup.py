"""Puts the kernels of ``native/`` into the package.

Their sources, which a GPU's compiler takes when they first run, and their host build where there is a C++
compiler; without one NumPy draws the same ids. On Windows the compiler is Zig's, which comes from PyPI: they
are written for GCC and Clang, and GCC does not align what AVX keeps on the stack there.
"""

import platform
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError


class BuildWithKernels(build_py):
    """Copies the sources into ``diagd/engines/devices`` of a wheel; a checkout reads them in place."""

    def run(self) -> None:
        """Build the package, then copy."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "diagd" / "engines" / "devices"
            for source in (*Path("native").glob("*.cu"), *Path("native").glob("*.h")):
                shutil.copy(source, target)


class BuildHostKernels(build_ext):
    """Builds what is no module but a library, without a module's entry."""

    def build_extension(self, ext: Extension) -> None:
        """Compile; CompileError: it cannot be, which ends no installation."""
        if sys.platform != "win32":
            super().build_extension(ext)
            return
        processor = {"AMD64": "x86_64", "ARM64": "aarch64"}.get(platform.machine(), platform.machine())
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory() as folder:
            library = Path(folder) / target.name  # debug symbols and more are written beside it
            words = [sys.executable, "-m", "ziglang", "c++", "-target", f"{processor}-windows-gnu", "-shared"]
            words += [*ext.extra_compile_args, *(f"-I{place}" for place in ext.include_dirs)]
            try:
                subprocess.run([*words, "-o", str(library), *ext.sources], check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise CompileError(str(error)) from error
            shutil.copyfile(library, target)


HOST_BUILD = Extension(
    "diagd.engines.devices.step_kernels_host",
    [
        f"native/{name}.cpp"
        for name in ("step_kernels_host", "onnxruntime_ops", "prefix_attention", "products")
    ],
    depends=[str(header) for header in Path("native").glob("*.h")],
    include_dirs=["native"],
    libraries=["dl"] if sys.platform == "linux" else [],
    language="c++",
    # Products are rounded before they are added, as in NumPy; no trap is asked for, which lets loops be wide.
    extra_compile_args=["-std=c++17", "-O3", "-ffp-contract=off", "-fno-trapping-math", "-fopenmp-simd"],
    optional=True,
)

setup(
    cmdclass={"build_py": BuildWithKernels, "build_ext": BuildHostKernels},
    ext_modules=[HOST_BUILD],
)
