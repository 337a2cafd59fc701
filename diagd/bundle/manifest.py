"""What a bundle says of itself: all that the runtime, or any other language, needs to read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationInfo, field_validator

from diagd.bundle.actions import ActionCodec, Record
from diagd.bundle.transformer import TransformerConfig
from diagd.schedule import Schedule, StreamLayout

SCHEMA_VERSION = 4
MANIFEST_NAME = "manifest.json"

Natural = Annotated[int, Field(ge=0, lt=1 << 31)]
Count = Annotated[int, Field(ge=1, lt=1 << 31)]
CacheType = Annotated[str, Field(pattern="^(float32|float16|int8)$")]

MOST_FRAME_TOKENS: Final = 1 << 24
"""Tokens of a frame: more than any model has, and as many as tables of them can be made for."""

INT8_CACHE = "-kv8"
"""Ending of the precision of step graphs whose K/V rows have 8 bits, as in ``int4-weight-kv8``."""


class Form(str, Enum):
    """How a step graph expresses attention with its cache update.

    ``PREFIX``: dynamic width and live length, sequence-major buffers bound by prefix.
    ``MODERN``: fixed width and capacity, TensorScatter and Attention.
    ``PORTABLE``: fixed width and capacity, read-only cache, new rows out.
    """

    PREFIX = "prefix"
    MODERN = "modern"
    PORTABLE = "portable"

    @property
    def traits(self) -> FormTraits:
        """What sets the form apart."""
        return FORMS[self]


@dataclass(frozen=True)
class FormTraits:
    """What sets a form apart.

    Attributes:
        opset: of its graphs.
        fixed: width, capacity and streams are fixed, K/V buffers [B, G, S, D]; else dynamic, [S, B, G, D].
        host: only ONNX Runtime runs it, on a processor, in float32 or with its own quantised products.
        rows_out: new K/V rows are outputs that the runtime appends; else the graph writes the buffers.
        float_cache: why its K/V buffers are floating point; None where they may be integers.
    """

    opset: int
    fixed: bool = True
    host: bool = False
    rows_out: bool = False
    float_cache: str | None = None


FORMS: Final = {
    Form.PREFIX: FormTraits(
        opset=23, fixed=False, host=True, float_cache="attention reads the buffers as they lie"
    ),
    Form.MODERN: FormTraits(opset=24, float_cache="TensorScatter takes floating point only"),
    Form.PORTABLE: FormTraits(opset=18, rows_out=True),
}


class IdRange(Record):
    """Ids [low, high) that may be sampled at a place of the frame; ``cell`` None is every other cell."""

    cell: Natural | None = None
    low: Natural
    high: Count


class SamplingRules(Record):
    """What a family lets be sampled, and its defaults.

    ``keep_crossing``: the token that crosses the top-p mass is kept. ``minimum_temperature``: lower positive
    temperatures are raised to it.
    """

    ranges: tuple[IdRange, ...]
    keep_crossing: bool = True
    minimum_temperature: Annotated[float, Field(ge=0)] = 0.0
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: Natural = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0

    def range_table(self, layout: StreamLayout) -> NDArray[np.int32]:
        """Allowed ids by place inside the frame, int32 [frame_length, 2]; known tokens take the default."""
        table = np.zeros((layout.frame_length, 2), np.int32)
        for rule in sorted(self.ranges, key=lambda rule: rule.cell is not None):
            place = slice(None) if rule.cell is None else layout.before + rule.cell
            table[place] = rule.low, rule.high
        return table


class RotaryContext(Record):
    """Sliding context of a rotary model: old frames are voided, nothing is recomputed.

    ``frames``: longest window. ``positions``: rows of the rotary table; before they run out, cached keys are
    turned back by whole frames, each by ``frame_angles`` (radians, one per channel pair).
    """

    kind: Literal["rotary"] = "rotary"
    frames: Count
    positions: Count
    frame_angles: tuple[float, ...]


class AbsoluteContext(Record):
    """Sliding context of a model whose hidden states depend on positions inside the window.

    ``frames``: longest window. When it is full it slides by ``roll`` frames at once, and what it still holds
    is fed again at its new positions.
    """

    kind: Literal["absolute"] = "absolute"
    frames: Count
    roll: Count = 1


def sliding_context(config: TransformerConfig) -> RotaryContext | AbsoluteContext:
    """How the context of a model slides."""
    if config.rotary is None or config.absolute:
        return AbsoluteContext(frames=config.context_frames)
    return RotaryContext(
        frames=config.context_frames,
        positions=config.rotary_positions,
        frame_angles=tuple(map(float, config.rotary.frame_angles(config.layout))),
    )


class GraphWeights(Record):
    """Weights of a graph: the files they lie in, and bytes.

    ``streamed``: bytes that every step reads. ``looked_up``: bytes of tables, such as embeddings, of which a
    step reads a row for each token it feeds.
    """

    files: tuple[str, ...]
    streamed: Annotated[int, Field(ge=0)]
    looked_up: Annotated[int, Field(ge=0)]

    @property
    def bytes(self) -> int:
        """Bytes of all weights."""
        return self.streamed + self.looked_up


class TextConditioning(Record):
    """Text that every pass attends to: ``graph`` maps text float32 [length, width] to its keys and values.

    Shorter texts are filled up with vectors of zero, which are attended to as well.
    """

    graph: str
    weight_files: tuple[str, ...]
    length: Count
    width: Count


class CacheShape(Record):
    """Dimensions of the K/V buffers; ``dtype`` is a NumPy name."""

    layers: Count
    kv_heads: Count
    head_size: Count
    dtype: CacheType


class StepGraph(Record):
    """One step graph; ``width`` and ``capacity`` are None where they are dynamic.

    ``streams``: that share its steps, where the width is fixed; else as many as wanted.
    ``cache_dtype``: NumPy name of its K/V elements where they are not those of ``Manifest.cache``.
    """

    file: str
    form: Form
    precision: str
    weights: GraphWeights
    width: Count | None = None
    capacity: Count | None = None
    streams: Count = 1
    cache_dtype: CacheType | None = None


class ClipRules(Record):
    """How recorded clips of a family become prompts.

    ``frames``: pictures of a video that are the prompt where the caller does not say. ``last``: they are its
    last ones, else its first. ``followed``: line t of its actions is what was done at picture t, so it leads
    to the next one; else it led to picture t. ``single``: what to warn of where the prompt is one picture.
    """

    frames: Annotated[int, Field(ge=1)] = 1
    last: bool = False
    followed: bool = False
    single: str | None = None


class MediaMark(Record):
    """What the licence of a model asks of media that it made.

    ``text`` stands on every picture of a video, ``program`` in the tags of its file. ``required``: the
    licence allows no media without.
    """

    text: Annotated[str, Field(min_length=1, max_length=80)]
    program: Annotated[str, Field(min_length=1, max_length=200)]
    required: bool = False


class Tokenizer(Record):
    """Pixel graphs: ``encoder`` uint8 [T, height, width, 3] -> int32 [t, rows, columns], ``decoder`` back.

    ``temporal_factor``: pixel frames per latent frame; where it is more than 1, the first frame of every call
    is a latent frame by itself. ``chunk_frames``: most pixel frames of one call; longer videos are cut into
    independent calls. ``cover``: pictures of another size are scaled evenly until they cover the frame, and
    cut to its centre; else they are stretched. ``parameters``: of both graphs together.
    """

    encoder: str
    decoder: str
    weight_files: tuple[str, ...]
    parameters: int
    height: Count
    width: Count
    temporal_factor: Count = 1
    chunk_frames: Count = 8
    cover: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a picture."""
        return self.height, self.width


class FileRecord(Record):
    """Size and digest of a file of the bundle."""

    bytes: int
    sha256: str


class Provenance(Record):
    """What the weights are: the name of their file, folder or address, and the digest of its content.

    ``tuned``: what was made of them since, a description of a fine-tuning.
    """

    source: str
    digest: str | None = None
    tuned: str | None = None
    diagd_version: str
    random_seed: int | None = None


class OwnLikelihood(Record):
    """How likely a model's own frames are to it: mean and deviation, nats, of their worst cells.

    ``precision`` is that of its step graph, ``window`` the frames that a query saw; the frames were drawn
    with the other three.
    """

    precision: str
    window: Count
    temperature: float
    top_k: Natural
    top_p: float
    mean: float
    deviation: Annotated[float, Field(ge=0)]


class Manifest(Record):
    """The whole of ``manifest.json``; ``transformer`` is all that its module is built from.

    ``order``: of decoding where the caller names none, as `Schedule.name` spells it. ``decoder``: whether it
    is by this order then, or by Jacobi. ``likelihoods``: as calibrations measured them.
    """

    schema_version: Annotated[int, Field(ge=1)] = SCHEMA_VERSION
    name: Annotated[str, Field(pattern=r"^[^/\\\x00-\x1f\x7f]{1,200}$")]  # it becomes part of file names
    family: str
    transformer: TransformerConfig
    sampling: SamplingRules
    context: Annotated[RotaryContext | AbsoluteContext, Field(discriminator="kind")]
    order: str
    decoder: Literal["order", "jacobi"] = "order"
    cache: CacheShape
    actions: ActionCodec | None = None
    clips: ClipRules = ClipRules()
    mark: MediaMark | None = None
    tokenizer: Tokenizer | None = None
    text: TextConditioning | None = None
    frames_per_second: Annotated[float, Field(gt=0)]
    graphs: Annotated[tuple[StepGraph, ...], Field(min_length=1)]
    likelihoods: tuple[OwnLikelihood, ...] = ()
    files: dict[str, FileRecord] = Field(default_factory=dict)
    provenance: Provenance
    licence: str

    @field_validator("transformer")
    @classmethod
    def _check_transformer(cls, config: TransformerConfig) -> TransformerConfig:
        sizes = (config.vocabulary, config.output_vocabulary, config.hidden, config.feed_forward)
        if min(*sizes, config.layers, config.heads, config.kv_heads, config.head_size) < 1:
            raise ValueError("sizes are at least 1")
        if config.context_frames < 1 or config.context_length >= 1 << 31:
            raise ValueError(f"a context of {config.context_length} tokens; expected 1 to 2**31 - 1")
        if config.layout.frame_length > MOST_FRAME_TOKENS:
            raise ValueError(
                f"{config.layout.frame_length} tokens a frame; expected {MOST_FRAME_TOKENS} at most"
            )
        return config

    @field_validator("sampling")
    @classmethod
    def _check_ranges(cls, rules: SamplingRules, rest: ValidationInfo) -> SamplingRules:
        if (config := rest.data.get("transformer")) is None:
            return rules
        for rule in rules.ranges:
            if not rule.low < rule.high <= config.output_vocabulary:
                raise ValueError(f"ids {rule.low}..{rule.high} of {config.output_vocabulary}")
            if rule.cell is not None and rule.cell >= config.layout.cells + config.layout.after:
                raise ValueError(f"cell {rule.cell} of {config.layout.cells}")
        if all(rule.cell is not None for rule in rules.ranges):
            raise ValueError("no ids for cells without a rule of their own")
        return rules

    @field_validator("order")
    @classmethod
    def _check_order(cls, order: str, rest: ValidationInfo) -> str:
        if "transformer" in rest.data:
            Schedule.parse(order, rest.data["transformer"].layout)
        return order

    @property
    def schedule(self) -> Schedule:
        """The default order of decoding."""
        return Schedule.parse(self.order, self.layout)

    @property
    def cell_ranges(self) -> NDArray[np.int32]:
        """Ids from the first to below the second that each cell may have, int32 [rows, columns, 2]."""
        layout = self.layout
        table = self.sampling.range_table(layout)[layout.before : layout.before + layout.cells]
        return table.reshape(layout.rows, layout.columns, 2)

    @property
    def precisions(self) -> list[str]:
        """Of the step graphs, each once; the first is that of whoever names none."""
        return list(dict.fromkeys(graph.precision for graph in self.graphs))

    @property
    def named_files(self) -> list[str]:
        """Every file that a part of it names, once."""
        names = [name for graph in self.graphs for name in (graph.file, *graph.weights.files)]
        if self.tokenizer:
            names += [self.tokenizer.encoder, self.tokenizer.decoder, *self.tokenizer.weight_files]
        if self.text:
            names += [self.text.graph, *self.text.weight_files]
        return list(dict.fromkeys(names))

    @property
    def spelling(self) -> str:
        """What decodes where the caller names nothing, as ``parse_decoder`` reads it."""
        return self.order if self.decoder == "order" else self.decoder

    @property
    def layout(self) -> StreamLayout:
        """The token stream."""
        return self.transformer.layout

    @property
    def vocabulary(self) -> int:
        """Ids that can be fed."""
        return self.transformer.vocabulary

    @property
    def output_vocabulary(self) -> int:
        """Ids that can be decoded."""
        return self.transformer.output_vocabulary

    def graph(self, form: Form) -> StepGraph:
        """The first step graph of a form; KeyError where the bundle has none."""
        for graph in self.graphs:
            if graph.form is form:
                return graph
        raise KeyError(form.value)

    def cache_dtype(self, graph: StepGraph) -> np.dtype[np.generic]:
        """Element type of the K/V buffers that a step graph reads."""
        return np.dtype(graph.cache_dtype or self.cache.dtype)
