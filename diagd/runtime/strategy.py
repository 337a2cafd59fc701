"""What decodes, from how it is spelled."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import replace

from pydantic.dataclasses import dataclass

from diagd.bundle import Bundle, Manifest
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import ScheduleError
from diagd.options import OPTIONS, File, setting
from diagd.runtime.decoders import Decoder, DraftDecoder, JacobiDecoder, ScheduledDecoder
from diagd.runtime.decoders.scoring import Scorer
from diagd.runtime.load import open_session
from diagd.runtime.session import Session
from diagd.schedule import Schedule

DRAFT = "draft"


@dataclass(frozen=True, config=OPTIONS)
class DraftOptions:
    """What drafts, and what is kept of it."""

    drafter: File | None = setting(
        "bundle that drafts, with the same layout and tokens (default: the model)", None
    )
    drafter_precision: str | None = setting("of its step graph (default: its first)", None)
    drafter_decoder: str | None = setting("that it decodes by (default: its own)", None)
    score: str = setting("of drafts: likelihood, onnx:PATH or a package's", "likelihood")

    def open(self, bundle: Bundle, window: int, cpu: CpuOptions, stack: ExitStack) -> Session:
        """The drafter's session beside one over ``bundle``; closed with ``stack``."""
        source = Bundle.open(self.drafter) if self.drafter else bundle
        session = open_session(source, window=window, cpu=cpu, precision=self.drafter_precision)
        return stack.enter_context(session)

    def decoder(
        self, drafter: Session, tau: float, score: Scorer, *, target_first: bool = True
    ) -> DraftDecoder:
        """A decoder with a bar; see ``DraftDecoder``."""
        spelled = self.drafter_decoder
        own = None if spelled is None else parse_decoder(spelled, drafter.manifest)
        return DraftDecoder(drafter, tau, score, decoder=own, target_first=target_first)


def parse_decoder(spelling: str | None, manifest: Manifest, *, compat: bool = False) -> Decoder:
    """The decoder of a spelling: ``jacobi``, perhaps with ``window=24``, or an order of decoding.

    ``diagonal`` is the bundle's own order. None is the bundle's own. Released caches (``compat``) keep the
    rows of seeds.

    Raises:
        ScheduleError: it is no spelling.
    """
    match = re.fullmatch(r"jacobi(?:[ ,]+window=([0-9]{1,6}))?", (spelling or manifest.decoder).strip())
    if match:
        return JacobiDecoder(int(match[1]) if match[1] else None)
    order = manifest.schedule
    if spelling is not None and spelling.strip() != "diagonal":
        try:
            order = Schedule.parse(spelling, manifest.layout, order)
        except ScheduleError as error:
            if "=" in spelling:  # of a row lag and what goes with it
                raise
            raise ScheduleError(f"{error}; or a decoder: ntp, diagonal, jacobi, {DRAFT}") from None
    return ScheduledDecoder(replace(order, refeed=False, keep_seeds=True) if compat else order)
