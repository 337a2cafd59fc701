"""What a model costs, and what devices have: bytes and operations of a step by formula, limits by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from diagd.bundle import Bundle, Form
from diagd.bundle.manifest import AbsoluteContext, RotaryContext
from diagd.bundle.precision import KV_CACHES, PRECISIONS, Precision
from diagd.bundle.transformer import TransformerConfig
from diagd.runtime.load import MOST_SESSIONS
from diagd.schedule import StreamLayout

GB: Final = 1e9
GIB: Final = 2**30


@dataclass(frozen=True)
class Device:
    """One device.

    Memory and what the system, the driver and the desktop keep of it (``reserved``) are bytes, the bandwidth
    bytes a second, ``peak`` dense matrix operations a second with half-precision inputs (single precision on
    a CPU).
    """

    name: str
    title: str
    memory: float
    bandwidth: float
    peak: float
    reserved: float
    source: str

    @property
    def usable(self) -> float:
        """Bytes left to a model."""
        return self.memory - self.reserved


_JETSON: Final = 1.5 * GB  # one memory for everything; without a desktop
_CARD: Final = 0.5 * GB

_TABLE: Final[tuple[tuple[str, str, float, float, float, float], ...]] = (
    ("orin-nano", "Jetson Orin Nano Super 8 GB", 8 * GB, 102 * GB, 17e12, _JETSON),
    ("orin-agx", "Jetson AGX Orin 64 GB", 64 * GB, 204.8 * GB, 42.5e12, _JETSON),
    ("thor", "Jetson AGX Thor 128 GB", 128 * GB, 273 * GB, 258e12, _JETSON),
    ("rtx4090", "GeForce RTX 4090", 24 * GIB, 1008 * GB, 165.2e12, _CARD),
    ("rtx5090", "GeForce RTX 5090", 32 * GIB, 1792 * GB, 209.5e12, _CARD),
    ("a100-80", "A100 80 GB SXM", 80 * GB, 2039 * GB, 312e12, _CARD),
    ("h200", "H200 141 GB SXM", 141 * GB, 4800 * GB, 989e12, _CARD),
)
_SOURCES: Final = {
    "orin-nano": "Jetson Orin Nano Super Developer Kit data sheet",
    "orin-agx": "Jetson AGX Orin Series technical brief v1.2: GPU part, dense, half of INT8",
    "thor": "Jetson Thor data sheet: an eighth of 2070 sparse FP4 TFLOPS",
    "rtx4090": "Ada GPU architecture whitepaper, FP32 accumulation",
    "rtx5090": "RTX Blackwell GPU architecture whitepaper, FP32 accumulation",
    "a100-80": "A100 Tensor Core GPU data sheet",
    "h200": "H200 Tensor Core GPU data sheet",
}
DEVICES: Final = {row[0]: Device(*row, f"NVIDIA {_SOURCES[row[0]]}") for row in _TABLE}
"""Devices of the table; ``this`` is measured where it is asked for."""

THIS: Final = "this"


@dataclass(frozen=True)
class ModelSize:
    """What a model reads and keeps, whatever the device.

    Attributes:
        context_frames: frames of a full window.
        layers, kv_heads, head_size: of the K/V cache.
        query_width: query heads times head size.
        output_vocabulary: logits of a row.
        streamed: parameters that every step reads: matrices, norms and the head.
        looked_up: parameters that a step does not: embeddings are read by row, a text is met once.
        tokenizer: parameters of the pixel graphs.
        pixel_frames: frames shown for one frame of tokens.
        refed: tokens fed again for each frame, where a sliding context is recomputed.
        reads_text: it attends to a text, of which an engine holds one.
    """

    name: str
    layout: StreamLayout
    context_frames: int
    layers: int
    kv_heads: int
    head_size: int
    query_width: int
    output_vocabulary: int
    streamed: int
    looked_up: int
    tokenizer: int = 0
    pixel_frames: int = 1
    refed: float = 0.0
    reads_text: bool = False

    @property
    def most_sessions(self) -> int:
        """That one engine of it decodes."""
        return 1 if self.reads_text else MOST_SESSIONS

    @property
    def cache_elements(self) -> int:
        """Elements of K and V that one token adds to the cache."""
        return 2 * self.layers * self.kv_heads * self.head_size


@dataclass(frozen=True)
class StoredModel:
    """A bundle's model with the bytes it is stored in.

    ``streamed_bytes`` is what every step reads of the weights, ``cache_bytes`` one K/V element.
    """

    size: ModelSize
    streamed_bytes: int
    cache_bytes: int

    def step_bytes(self, live: float) -> float:
        """Bytes one pass reads: what it streams of the weights, and ``live`` tokens of the K/V cache."""
        return self.streamed_bytes + self.cache_bytes * self.size.cache_elements * live


def size_of(
    name: str,
    config: TransformerConfig,
    context: RotaryContext | AbsoluteContext,
    *,
    tokenizer: int,
    pixel_frames: int,
) -> ModelSize:
    """Dimensions of a transformer with a tokenizer of so many parameters; see ``ModelSize``."""
    refed = 0.0  # tokens fed again for each frame of an endless run, in the mean
    if not isinstance(context, RotaryContext):
        refed = (context.frames - context.roll) * config.layout.frame_length / context.roll
    return ModelSize(
        name=name,
        layout=config.layout,
        context_frames=context.frames,
        layers=config.layers,
        kv_heads=config.kv_heads,
        head_size=config.head_size,
        query_width=config.query_width,
        output_vocabulary=config.output_vocabulary,
        streamed=config.parameters - config.looked_up_parameters,
        looked_up=config.looked_up_parameters,
        tokenizer=tokenizer,
        pixel_frames=pixel_frames,
        refed=refed,
        reads_text=config.text is not None,
    )


def read_model(bundle: Bundle, form: Form | None = None) -> StoredModel:
    """Dimensions of a bundle and bytes of its first step graph, or of its first one of a form."""
    manifest, pixels = bundle.manifest, bundle.manifest.tokenizer
    entry = manifest.graph(form) if form else manifest.graphs[0]
    size = size_of(
        manifest.name,
        manifest.transformer,
        manifest.context,
        tokenizer=pixels.parameters if pixels else 0,
        pixel_frames=pixels.temporal_factor if pixels else 1,
    )
    return StoredModel(size, entry.weights.streamed, manifest.cache_dtype(entry).itemsize)


def precisions(kv_cache: str | None = None) -> dict[str, Precision]:
    """``PRECISIONS``, with a quantised K/V cache if one is named."""
    if kv_cache is None:
        return dict(PRECISIONS)
    return {name: replace(entry, cache=KV_CACHES[kv_cache]) for name, entry in PRECISIONS.items()}


def live_tokens(model: ModelSize, generated: int = 1) -> float:
    """Mean tokens in the cache while a full context's last ``generated`` frames are decoded."""
    frames = model.context_frames - generated / 2
    return model.layout.prefix + frames * model.layout.frame_length


def cache_bytes(model: ModelSize, precision: Precision, tokens: float) -> float:
    """Bytes of K and V for that many tokens."""
    return model.cache_elements * precision.cache * tokens


def step_bytes(model: ModelSize, precision: Precision, live: float) -> float:
    """Bytes one pass reads: every streamed parameter once, and the live K/V rows once."""
    return model.streamed * precision.weight + cache_bytes(model, precision, live)


def step_operations(model: ModelSize, width: float, live: float) -> float:
    """Floating-point operations of one pass: 2 a parameter and fed token, 4 a query element and live slot."""
    return width * (2.0 * model.streamed + 4.0 * model.layers * model.query_width * live)


def step_seconds(bytes_read: float, operations: float, bandwidth: float, peak: float) -> float:
    """Least time of a pass on a roofline (Williams et al., 2009): the slower of memory and arithmetic."""
    return max(bytes_read / bandwidth, operations / peak)
