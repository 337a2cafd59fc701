"""What of decoding a player can change while a world runs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from diagd.bundle import Manifest
from diagd.options import Frozen
from diagd.runtime.decoders import Decoder
from diagd.runtime.options import parse_decoder
from diagd.runtime.sampling import SamplingSettings


class PlaySettings(Frozen):
    """Decoder, sampler and seed of the frames to come.

    Attributes:
        decoder: as ``parse_decoder`` reads it, such as ``k=1 serial`` or ``jacobi``.
    """

    decoder: Annotated[str, Field(max_length=80)]
    temperature: Annotated[float, Field(ge=0, le=100)]
    top_k: Annotated[int, Field(ge=0, le=1 << 24)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    seed: Annotated[int, Field(ge=0, lt=1 << 53)] = 0

    @classmethod
    def of(cls, manifest: Manifest) -> PlaySettings:
        """A bundle's own."""
        rules = manifest.sampling
        return cls(
            decoder=manifest.spelling,
            temperature=rules.temperature,
            top_k=rules.top_k,
            top_p=rules.top_p,
        )

    @property
    def sampling(self) -> SamplingSettings:
        """How tokens are drawn.

        Raises:
            UsageError: a value cannot be drawn with.
        """
        return SamplingSettings(self.temperature, self.top_k, self.top_p)

    def open(self, manifest: Manifest) -> Decoder:
        """The decoder, new.

        Raises:
            ScheduleError: it is no decoder, or its lags cannot be decoded.
        """
        return parse_decoder(self.decoder, manifest)
