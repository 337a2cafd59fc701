"""Puts the kernels of ``native/`` into the package.

Their sources, which a GPU's compiler takes when they first run, and their host build where there is a C++
compiler; without one NumPy draws the same ids.
"""

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py


class BuildWithKernels(build_py):
    """Copies the sources into ``diagd/engines/devices`` of a wheel; a checkout reads them in place."""

    def run(self) -> None:
        """Build the package, then copy."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "diagd" / "engines" / "devices"
            for source in (*Path("native").glob("*.cu"), *Path("native").glob("*.h")):
                shutil.copy(source, target)


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
    cmdclass={"build_py": BuildWithKernels},
    ext_modules=[] if sys.platform == "win32" else [HOST_BUILD],  # a library without a module's entry
)
