"""How a bundle is calibrated."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from diagd.bundle.manifest import INT8_CACHE
from diagd.calibration.gate import Budget, parse_budget
from diagd.options import FLAG, OPTIONS


def _budget(value: object) -> object:
    return parse_budget(value, Budget()) if isinstance(value, str) else value


@dataclass(frozen=True, config=OPTIONS)
class CalibrationOptions:
    """How a bundle is calibrated."""

    precision: Annotated[str, FLAG] = Field(description="the scheme, see below")
    budget: Annotated[Budget | None, BeforeValidator(_budget), FLAG] = Field(
        default=Budget(),
        description="what may be lost: agreement=0.97,nll=0.01,psnr=30 (the defaults), or none to judge "
        "nothing",
    )
    steps: int = Field(
        default=320, description="passes of the calibration run, and of each round of the gate, at least 64"
    )
    seed: Annotated[int, FLAG] = Field(default=0, description="of prompts, actions and sampling (default 0)")
    floor: float | None = Field(
        default=None, description="dB below which a product is not quantised (default: the scheme's)"
    )
    threads: int = Field(default=0, ge=0, description="CPU threads, 0 for one a core")
    floats: Literal["fp16", "fp32"] = Field(
        default="fp16", description="of GPU graphs beside their quantised products: fp16 or fp32"
    )
    kv_cache: Annotated[str | None, FLAG] = Field(
        default=None, description="int8: K/V rows of 8 bits too, in portable graphs"
    )

    @property
    def name(self) -> str:
        """Precision of the graphs that are written: ``int4-weight``, ``int4-weight-kv8``."""
        return self.precision + (INT8_CACHE if self.kv_cache else "")
