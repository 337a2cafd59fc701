"""How a bundle is calibrated: the schemes, and the options of a run."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Literal

from pydantic import BeforeValidator

from diagd.bundle.manifest import INT8_CACHE, Form
from diagd.bundle.precision import FLOATING, PRECISIONS, Precision
from diagd.errors import UsageError, unknown
from diagd.options import SEED, checked, flag, setting

SCHEMES = {name: precision for name, precision in PRECISIONS.items() if name not in FLOATING}
"""How weights and activations can be stored."""


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


def parse_budget(text: object) -> object:
    """``agreement=0.97,nll=0.01,psnr=30``, any of them; ``none`` is None, other text a UsageError."""
    if not isinstance(text, str) or text == "none":
        return None if text == "none" else text
    values = dataclasses.asdict(Budget())
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
        if name == "agreement" and values[name] >= 2:
            raise UsageError(f"--budget {pair}: expected a share such as agreement=0.97, not per cent")
    return Budget(**values)


@checked
class CalibrationOptions:
    """How a bundle is calibrated."""

    precision: str = flag("the scheme, see below")
    budget: Annotated[Budget | None, BeforeValidator(parse_budget)] = flag(
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

    @property
    def scheme(self) -> Precision:
        """How weights and activations are stored; UsageError where the name is none."""
        if self.precision not in SCHEMES:
            raise unknown("precision", self.precision, SCHEMES)
        return SCHEMES[self.precision]

    def refusal(self, form: Form) -> str | None:
        """Why graphs of a form cannot have it; None where they can."""
        if self.scheme.scaling == "row" and not form.traits.host:
            return f"TensorRT has no product whose activations are scaled row by row, as {self.precision} is"
        float_cache = form.traits.float_cache if self.kv_cache else None
        return float_cache and f"{float_cache}, the cache is {self.kv_cache}"
