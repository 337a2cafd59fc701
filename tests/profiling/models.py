"""Released models by their published dimensions, parameters counted by hand from them."""

from __future__ import annotations

from diagd.profiling.cost import ModelSize
from diagd.schedule import StreamLayout


def llama(
    name: str,
    layout: StreamLayout,
    frames: int,
    *,
    layers: int,
    hidden: int,
    inner: int,
    query: int,
    kv_heads: int,
    head_size: int,
    vocabulary: int,
    matrices: int = 3,
    pixel_frames: int = 1,
) -> ModelSize:
    """Gated feed-forward (three matrices) or plain (two)."""
    attention = 2 * hidden * query + 2 * hidden * kv_heads * head_size
    body = layers * (attention + matrices * hidden * inner)
    return ModelSize(
        name=name,
        layout=layout,
        context_frames=frames,
        layers=layers,
        kv_heads=kv_heads,
        head_size=head_size,
        query_width=query,
        output_vocabulary=vocabulary,
        streamed=body + hidden * vocabulary,
        looked_up=hidden * vocabulary,
        pixel_frames=pixel_frames,
    )


COSMOS = StreamLayout(40, 64)
MINEWORLD = StreamLayout(14, 24, after=11)
WHAM = StreamLayout(18, 30, after=16)


def mineworld(name: str, hidden: int, inner: int) -> ModelSize:
    return llama(
        name,
        MINEWORLD,
        16,
        layers=20,
        hidden=hidden,
        inner=inner,
        query=hidden,
        kv_heads=4,
        head_size=64,
        vocabulary=8262,
    )


def cosmos(name: str, layers: int, hidden: int) -> ModelSize:
    return llama(
        name,
        COSMOS,
        5,
        layers=layers,
        hidden=hidden,
        inner=14336,
        query=4096,
        kv_heads=8,
        head_size=128,
        vocabulary=64000,
        pixel_frames=8,
    )


COSMOS_4B, COSMOS_12B = cosmos("cosmos-4b", 16, 4096), cosmos("cosmos-12b", 40, 5120)
MINEWORLD_300M = mineworld("mineworld-300m", 1024, 4096)
MINEWORLD_700M = mineworld("mineworld-700m", 2048, 4096)
MINEWORLD_1200M = mineworld("mineworld-1200m", 2048, 8192)
WHAM_1600M = llama(
    "wham-1.6b",
    WHAM,
    10,
    layers=24,
    hidden=2304,
    inner=4 * 2304,
    query=2304,
    kv_heads=18,
    head_size=128,
    vocabulary=16560,
    matrices=2,
)
