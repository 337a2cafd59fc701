"""Puts the device kernels of ``native/`` into the package; an installation compiles them when it runs."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

KERNELS = ("step_kernels.cu", "step_kernels.h")


class BuildWithKernels(build_py):
    """Copies the sources beside ``diagd/engines/cuda`` of a wheel; a checkout reads them where they lie."""

    def run(self) -> None:
        """Build the package, then copy."""
        super().run()
        if not self.editable_mode:
            for name in KERNELS:
                shutil.copy(Path("native") / name, Path(self.build_lib) / "diagd" / "engines" / "cuda" / name)


setup(cmdclass={"build_py": BuildWithKernels})
