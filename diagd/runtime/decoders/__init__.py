"""Which steps are run, and which of their predictions are kept: strategies over a stream."""

from diagd.runtime.decoders.decoder import ActingDecoder, Blocks, Decoder
from diagd.runtime.decoders.draft import DraftDecoder
from diagd.runtime.decoders.jacobi import JacobiDecoder
from diagd.runtime.decoders.scheduled import ForcedDecoder, RasterDecoder, ScheduledDecoder

__all__ = [
    "ActingDecoder",
    "Blocks",
    "Decoder",
    "DraftDecoder",
    "ForcedDecoder",
    "JacobiDecoder",
    "RasterDecoder",
    "ScheduledDecoder",
]
