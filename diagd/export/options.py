"""Which graphs a bundle gets."""

from __future__ import annotations

from typing import Annotated, Literal

from diagd.bundle import Form
from diagd.errors import UsageError
from diagd.options import NAMES, Numbers, checked, flag, setting


@checked
class GraphOptions:
    """Which graphs a bundle gets; ``widths`` and ``window`` are for the forms with a fixed capacity.

    ``widths`` None are those that decode every schedule of the model, see ``diagd.schedule.default_widths``.

    Raises:
        UsageError: a form that does not run at this precision.
    """

    form: Annotated[tuple[Form, ...] | None, NAMES] = flag(
        "prefix (CPU), modern (GPU, TensorRT 10.15 and later), portable (TensorRT 10.3 to "
        "10.14), or several: prefix,modern (default: prefix for fp32, modern for fp16)",
        None,
    )
    precision: Literal["fp32", "fp16"] = flag("of the step graphs", "fp32")
    widths: Numbers | None = setting(
        "step widths of the GPU forms, as 16,64; a step takes the next wider one. Reading the "
        "weights bounds a step of 16 rows as it does one of 1, and each width costs memory and build time "
        "(default: 16 and what k=1 with chained frames feeds at once, 64 at least)",
        None,
    )
    streams: int = setting(
        "sessions that share a step of the GPU forms; graphs of the prefix form take any number",
        1,
        ge=1,
        le=64,
    )
    window: int | None = setting("frames that fixed KV buffers hold (default: the context)", None)

    def __post_init__(self) -> None:
        if self.precision != "fp32":
            for form in (form for form in self.forms if form.traits.host):
                raise UsageError(
                    f"the {form.value} form runs on the CPU, which has no {self.precision} matrix product; "
                    "use --precision fp32, or --form modern for a GPU"
                )

    @property
    def forms(self) -> tuple[Form, ...]:
        """The forms, those of the precision where none is named."""
        return self.form or ((Form.PREFIX,) if self.precision == "fp32" else (Form.MODERN,))
