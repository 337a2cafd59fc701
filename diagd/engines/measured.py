"""How fast this machine decoded a bundle by each backend, as it was last measured."""

from __future__ import annotations

import hashlib

from pydantic import ValidationError

from diagd.bundle import Bundle, cache
from diagd.bundle.actions import Record
from diagd.engines.host import cores, processor_features

_KIND = "backends"


class Measurement(Record):
    """A way to decode a bundle, and what it took.

    Attributes:
        backend: its name.
        precision: of the step graph.
        computed: precision that the backend computes it in.
        threads: of the processor.
        seconds: of a frame.
        passed: tokens and logits are inside the gate of ``computed``; None: there was no FP32 graph to tell.
    """

    backend: str
    precision: str
    computed: str
    threads: int
    seconds: float
    passed: bool | None

    def __str__(self) -> str:
        computed = "" if self.computed == self.precision else f" in {self.computed}"
        return f"{self.backend} {self.precision}{computed}"

    @property
    def settings(self) -> str:
        """What chooses it on the command line."""
        return f"--set backend={self.backend} --set precision={self.precision} --set threads={self.threads}"


class Measurements(Record):
    """All ways that were measured on a day, in one order of decoding."""

    date: str
    order: str
    entries: tuple[Measurement, ...]

    def fastest(self, backend: str | None = None, precision: str | None = None) -> Measurement | None:
        """The fastest that did not fail; of one backend or precision, where they are named."""
        fit = [entry for entry in self.entries if entry.passed is not False]
        fit = [entry for entry in fit if backend in (None, entry.backend)]
        fit = [entry for entry in fit if precision in (None, entry.precision)]
        return min(fit, key=lambda entry: entry.seconds, default=None)


def read(bundle: Bundle) -> Measurements | None:
    """What was measured of a bundle on this machine, or None."""
    if (content := cache.read(_KIND, _key(bundle))) is None:
        return None
    try:
        return Measurements.model_validate_json(content)
    except ValidationError:  # of another diagd: as good as absent
        return None


def keep(bundle: Bundle, found: Measurements) -> None:
    """Keep what was measured for ``read``."""
    cache.write(_KIND, _key(bundle), found.model_dump_json().encode())


def _key(bundle: Bundle) -> str:
    """Of what the times depend on."""
    described = f"{bundle.digest} {cores()} {processor_features()}"
    return hashlib.sha256(described.encode()).hexdigest()[:32]
