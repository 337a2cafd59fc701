"""How a bundle is calibrated: the schemes, and the options of a run."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Literal

from pydantic import BeforeValidator

from diagd.bundle.manifest import INT8_CACHE
from diagd.bundle.precision import FLOATING, PRECISIONS, Precision
from diagd.errors import UsageError, unknown
from diagd.options import SEED, checked, flag, setting

SCHEMES = {name: precision for name, precision in PRECISIONS.items() if name not in FLOATING}
"""How weights and activations can be stored."""


def find_scheme(name: str) -> Precision:
    """The scheme of a name; UsageError where there is none."""
    if name not in SCHEMES:
        raise unknown("precision", name, SCHEMES)
    return SCHEMES[name]


@dataclasses.dataclass(frozen=True)
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


def parse_budget(text: str, default: Budget) -> Budget | None:
    """``agreement=0.97,nll=0.01,psnr=30``, any of them; ``none`` is None, anything else a UsageError."""
    if text == "none":
        return None
    values = dataclasses.asdict(default)
    for pair in filter(None, text.split(",")):
        name, _, number = pair.partition("=")
        if name not in values:
            raise unknown("budget", name, values)
        try:
            values[name] = float(number)
        except ValueError:
            values[name] = math.nan
        if not math.isfinite(values[name]):
            raise UsageError(f"--budget {pair}: expected NAME=NUMBER")
    return Budget(**values)


def _budget(value: object) -> object:
    return parse_budget(value, Budget()) if isinstance(value, str) else value


@checked
class CalibrationOptions:
    """How a bundle is calibrated."""

    precision: str = flag("the scheme, see below")
    budget: Annotated[Budget | None, BeforeValidator(_budget)] = flag(
        "what may be lost: agreement=0.97,nll=0.01,psnr=30 (the defaults), or none to judge nothing", Budget()
    )
    steps: int = setting("passes of the calibration run, and of each round of the gate, at least 64", 320)
    seed: int = flag("of prompts, actions and sampling (default 0)", 0, **SEED)
    floor: float | None = setting("dB below which a product is not quantised (default: the scheme's)", None)
    threads: int = setting("CPU threads, 0 for one a core", 0, ge=0)
    floats: Literal["fp16", "fp32"] = setting(
        "of GPU graphs beside their quantised products: fp16 or fp32", "fp16"
    )
    kv_cache: str | None = flag("int8: K/V rows of 8 bits too, in portable graphs", None)

    @property
    def name(self) -> str:
        """Precision of the graphs that are written: ``int4-weight``, ``int4-weight-kv8``."""
        return self.precision + (INT8_CACHE if self.kv_cache else "")
