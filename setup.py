"""Puts the device kernels of ``native/`` into the package; an installation compiles them when it runs."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

KERNELS = ("step_kernels.cu", "step_kernels.h", "sampling.h")


class BuildWithKernels(build_py):
    """Copies the sources into ``diagd/engines/devices`` of a wheel; a checkout reads them in place."""

    def run(self) -> None:
        """Build the package, then copy."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "diagd" / "engines" / "devices"
            for name in KERNELS:
                shutil.copy(Path("native") / name, target / name)


setup(cmdclass={"build_py": BuildWithKernels})
