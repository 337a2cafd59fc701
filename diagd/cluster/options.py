"""What can be told of a cluster."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from diagd.options import FLAG, OPTIONS


@dataclass(frozen=True, config=OPTIONS)
class ClusterOptions:
    """Who does the work.

    Attributes:
        gpus: of each worker on a cluster, or a share of one.
    """

    workers: Annotated[int | None, FLAG] = Field(
        default=None, ge=1, le=1024, description="processes of one thread; the result is that of any number"
    )
    cluster: Annotated[str | None, FLAG] = Field(
        default=None, description="Ray cluster whose nodes do the work: HOST:PORT, auto, or local"
    )
    gpus: float = Field(default=0, ge=0, description="of each worker on a cluster, or a share of one")

    @property
    def is_asked(self) -> bool:
        """Whether anything is said of who does the work."""
        return self.workers is not None or self.cluster is not None


@dataclass(frozen=True, config=OPTIONS)
class EngineOptions:
    """Where engines are that worlds are played on."""

    cluster: Annotated[str | None, FLAG] = Field(
        default=None, description="Ray cluster whose nodes play: HOST:PORT, auto, or local"
    )
    engines: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="of a cluster, of --sessions worlds each (default: one a node)",
    )
    cores: float = Field(default=1, gt=0, description="of each engine on a cluster")
    gpus: float = Field(default=0, ge=0, description="of each engine on a cluster, or a share of one")
