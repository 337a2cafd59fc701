"""What calibrations did, as data: the schema of ``calibration/report.json``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diagd.bundle.files import atomic_file
from diagd.errors import BundleError

REPORT_VERSION = 2
REPORT_NAME = "report.json"

Figures = dict[str, float | None]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerReport(_Record):
    """One product with a constant weight.

    Attributes:
        name, inputs, outputs: of its weight.
        signal_to_noise: of its product on calibration rows, dB.
        divergence: nats by which predictions move when its layer alone is quantised; None: not measured.
        alpha: of the migration; None without.
        range: largest activation that is told apart; None where activations stay in floating point.
        excluded: why it stays in floating point: ``floor`` or ``gate``; None where it is quantised.
    """

    name: str
    inputs: int
    outputs: int
    signal_to_noise: float
    divergence: float | None = None
    alpha: float | None = None
    range: float | None = None
    excluded: str | None = None


class TrajectoryReport(_Record):
    """What was decoded: passes of the run that finds ranges, and of one round of the gate."""

    name: str
    k: int
    d: int
    steps: int


class WidthReport(_Record):
    """Steps of one width: share of equal predictions, and median milliseconds of each engine alone."""

    predictions: int
    agreement: float
    milliseconds_before: float
    milliseconds_after: float


@dataclass(frozen=True)
class Budget:
    """What a quantised model may lose.

    Attributes:
        agreement: smallest share of predictions whose most probable token is that of FP32.
        nll: largest relative rise of the NLL of tokens that the FP32 model draws.
        psnr: smallest PSNR of all frames of most probable tokens against those of FP32, dB.
    """

    agreement: float = 0.97
    nll: float = 0.01
    psnr: float = 30.0


class AttemptReport(_Record):
    """One run of the gate: how many products stay in floating point, and the figures (``Evaluation``)."""

    excluded: int
    figures: Figures
    failures: tuple[str, ...]


class CacheReport(_Record):
    """K/V rows of 8 bits: bytes a token before and after, and signal to noise of each buffer's rows, dB."""

    dtype: str
    bytes_before: int
    bytes_after: int
    signal_to_noise: dict[str, float]


class PrecisionReport(_Record):
    """One calibration.

    Attributes:
        precision, reference: of the graphs that were made, and of those they are compared with.
        seed: of the calibration run; the same seed gives the same scales.
        gate_seed: of the comparison.
        trajectories: what was decoded.
        budget: None where nothing was judged.
        attempts: runs of the gate; each but the first left more products in floating point.
        bytes_before, bytes_after: of the weights that a step reads.
        widths: by rows of the step.
        forms: form to the files of its graphs.
        left_out: form to why it has no graph.
        layers: each product.
        kv_cache: None where it stays in floating point.
    """

    precision: str
    reference: str
    seed: int
    gate_seed: int
    trajectories: tuple[TrajectoryReport, ...]
    budget: Budget | None
    attempts: tuple[AttemptReport, ...]
    bytes_before: int
    bytes_after: int
    widths: dict[int, WidthReport]
    forms: dict[str, str] = Field(default_factory=dict)
    left_out: dict[str, str] = Field(default_factory=dict)
    layers: tuple[LayerReport, ...]
    kv_cache: CacheReport | None = None

    @property
    def figures(self) -> Figures:
        """Of the last attempt; none where nothing was judged."""
        return self.attempts[-1].figures if self.attempts else {}

    @property
    def failures(self) -> tuple[str, ...]:
        """What is outside the budget."""
        return self.attempts[-1].failures if self.attempts else ()

    @property
    def excluded(self) -> list[str]:
        """Products that stay in floating point."""
        return [layer.name for layer in self.layers if layer.excluded]


class CalibrationReport(_Record):
    """The whole of ``report.json``: an entry for each precision."""

    schema_version: Annotated[int, Field(ge=1, le=REPORT_VERSION)] = REPORT_VERSION
    model: str
    precisions: dict[str, PrecisionReport] = Field(default_factory=dict)


def read_calibration(directory: Path) -> CalibrationReport | None:
    """The report of a bundle's ``calibration`` directory; None where there is none.

    Raises:
        BundleError: it is damaged or of a later version.
    """
    file = directory / REPORT_NAME
    if not file.is_file():
        return None
    try:
        return CalibrationReport.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"{file}: field '{where}': {first['msg']}; calibrate a fresh export") from error


def add_report(directory: Path, model: str, report: PrecisionReport) -> None:
    """Write the report of a precision beside those of others."""
    known = read_calibration(directory) or CalibrationReport(model=model)
    whole = known.model_copy(update={"precisions": {**known.precisions, report.precision: report}})
    with atomic_file(directory / REPORT_NAME) as partial:
        partial.write_text(whole.model_dump_json(indent=2) + "\n", encoding="utf-8")
