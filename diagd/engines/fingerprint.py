"""What a compiled engine depends on, and where compiled engines are kept."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from diagd.bundle import Bundle, Form
from diagd.bundle.actions import Record
from diagd.bundle.files import atomic_directory, sha256, turn
from diagd.bundle.manifest import StepGraph
from diagd.errors import EngineError

RECORD_NAME = "engine.json"
PLAN_NAME = "step.plan"
ANY = "any"
"""Device or driver of an engine that was built for a family of GPUs rather than on one."""


class Fingerprint(Record):
    """Everything that must be the same where an engine is built and where it runs.

    Attributes:
        graph: digest of the ONNX file and its weights.
        runtime: TensorRT flavour and version.
        device: name of the GPU, or ``any``.
        targets: compute capabilities the engine runs on, as ``sm89``.
        driver: version, or ``any``.
        form, precision, widths, tokens: of the step graph and its buffers; no widths: any.
        flags: options of the build that change the engine; none: any.
    """

    graph: str
    runtime: str
    device: str
    targets: tuple[str, ...]
    driver: str
    form: Form
    precision: str
    widths: tuple[int, ...]
    tokens: Annotated[int, Field(ge=1)]
    flags: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Name of the engine's directory."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    def differences(self, here: Fingerprint) -> list[str]:
        """Parts in which an engine does not fit a machine, as ``part: built with X, here Y``."""
        return [
            f"{name}: built for {_text(getattr(self, name))}, here {_text(getattr(here, name))}"
            for name in type(self).model_fields
            if not self._fits(here, name)
        ]

    def _fits(self, here: Fingerprint, name: str) -> bool:
        built, wanted = getattr(self, name), getattr(here, name)
        if name in {"device", "driver"} and built == ANY:
            return True
        if name in {"widths", "flags"} and not wanted:
            return True
        if name == "targets":
            return set(wanted) <= set(built)
        return bool(built == wanted)


class EngineRecord(Record):
    """What ``engine.json`` says of the plan beside it."""

    fingerprint: Fingerprint
    bytes: int
    sha256: str
    diagd_version: str


@dataclass(frozen=True)
class StoredEngine:
    """A compiled engine on disk."""

    directory: Path
    record: EngineRecord

    @property
    def plan(self) -> Path:
        """File of the serialised engine."""
        return self.directory / PLAN_NAME


class EngineStore:
    """Compiled engines of a bundle: ``engines/<key>/`` inside it."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.root = bundle, bundle.path / "engines"

    def write(self, fingerprint: Fingerprint, plan: bytes | memoryview, version: str) -> StoredEngine:
        """Keep an engine, whole or not at all, and read it back.

        Raises:
            EngineError: what is on disk is not what was built.
        """
        digest = hashlib.sha256(plan).hexdigest()
        record = EngineRecord(fingerprint=fingerprint, bytes=len(plan), sha256=digest, diagd_version=version)
        directory = self.root / fingerprint.key
        with (
            turn(self.bundle.path.resolve()),
            atomic_directory(directory, (PLAN_NAME, RECORD_NAME)) as partial,
        ):
            (partial / PLAN_NAME).write_bytes(plan)
            (partial / RECORD_NAME).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
        stored = StoredEngine(directory, record)
        check_plan(stored)
        return stored

    def __iter__(self) -> Iterator[StoredEngine]:
        """Engines whose record can be read."""
        for file in sorted(self.root.glob(f"*/{RECORD_NAME}")):
            try:
                yield StoredEngine(file.parent, EngineRecord.model_validate_json(file.read_bytes()))
            except (ValidationError, OSError):
                continue  # of another diagd: as good as absent

    def find(self, here: Fingerprint, *others: Fingerprint) -> StoredEngine:
        """The engine that fits this machine and graph; ``others`` are further choices that would do.

        Raises:
            EngineError: there is none, or it is damaged; the message names what differs and the line that
                builds the right one.
        """
        stored = [
            (engine, min((engine.record.fingerprint.differences(f) for f in (here, *others)), key=len))
            for engine in self
        ]
        if not stored:
            raise EngineError(f"{self.bundle.path} has no compiled engine; run: {self.build_line(here)}")
        engine, differences = min(stored, key=lambda pair: len(pair[1]))
        if differences:
            raise EngineError(
                f"no compiled engine of {self.bundle.path} fits; the nearest differs in "
                f"{'; '.join(differences)}. Run: {self.build_line(here)}"
            )
        check_plan(engine)
        return engine

    def build_line(self, here: Fingerprint) -> str:
        """The command that builds the engine which would fit."""
        line = f"diagd-build {shlex.quote(str(self.bundle.path))} --precision {here.precision}"
        line += f" --form {here.form.value} --runtime {here.runtime.split()[0]}"
        if here.widths:
            line += f" --widths {','.join(map(str, here.widths))}"
        return "".join([line, *(f" --set {flag}" for flag in here.flags)])


def check_plan(engine: StoredEngine) -> None:
    """Compare a plan with its record.

    Raises:
        EngineError: it is truncated or altered.
    """
    record, plan = engine.record, engine.plan
    size = plan.stat().st_size if plan.is_file() else 0
    if size != record.bytes or sha256(plan) != record.sha256:
        raise EngineError(
            f"{plan} is damaged: {size} bytes, its record says {record.bytes} with sha256 "
            f"{record.sha256[:12]}; delete {engine.directory} and run diagd-build again"
        )


def graph_digest(bundle: Bundle, graph: StepGraph) -> str:
    """Digest of a step graph and the files its weights lie in."""
    return bundle.digest_of(graph.file, *graph.weights.files)


def _text(value: object) -> str:
    if isinstance(value, Form):
        return value.value
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    text = str(value)
    return text[:12] if len(text) == hashlib.sha256().digest_size * 2 else text
