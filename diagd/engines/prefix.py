"""The ``prefix`` form on ONNX Runtime's CPU provider: cost follows the slots in use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from diagd.bundle import Bundle, Form, Manifest
from diagd.engines.buffers import aligned_zeros, cache_tensors, rotate_pairs, text_buffers
from diagd.engines.engine import VOID, Clock, Float, HostClock, Int, Steps
from diagd.engines.fingerprint import graph_digest
from diagd.engines.onnxruntime_session import CpuOptions, open_session
from diagd.engines.sampler import HostSampler

if TYPE_CHECKING:
    import onnxruntime

GRANULE = 32
"""Slots by which the bound prefix grows: most steps then bind the same K/V shapes as the step before."""

MAX_WIDTH = 256
"""Widest pass; the prompt is fed in chunks of it, which bounds the scores' memory."""


class PrefixState:
    """What an engine of the ``prefix`` form keeps on the host, and what is done with it between steps.

    Args:
        manifest: of the bundle.
        capacity: slots of the buffers.
        tokens: size of the token buffer.
        max_width: widest step.

    Attributes:
        token_buffer: int32 [tokens].
        slot_position: int32 [capacity].
        buffers: K/V rows [capacity, G, D] by ``key_0``, ``value_0``, ...
    """

    form = Form.PREFIX
    ahead = False

    def __init__(self, manifest: Manifest, capacity: int, tokens: int, max_width: int) -> None:
        self.capacity, self.max_width = capacity, max_width
        self.clock: Clock = HostClock()
        self.token_buffer: Int = np.zeros(tokens, np.int32)
        self.slot_position: Int = np.full(capacity, VOID, np.int32)
        shape = (capacity, manifest.cache.kv_heads, manifest.cache.head_size)
        dtype = np.dtype(manifest.cache.dtype)
        self.buffers = {name: aligned_zeros(shape, dtype) for name in cache_tensors(manifest.cache)}
        self._sampler = HostSampler(manifest)
        self._text = text_buffers(manifest)
        self._session: Any = None

    def padded_widths(self, widths: Int) -> Int:
        """Widths are dynamic: no pad rows."""
        return widths

    def write_tokens(self, places: Int, ids: Int) -> None:
        """Put ids into the token buffer."""
        self.token_buffer[places] = ids

    def read_tokens(self, places: Int) -> Int:
        """Ids in the token buffer."""
        return self.token_buffer[places]

    def write_slots(self, slot_position: Int) -> None:
        """Take the position of every slot."""
        self.slot_position[:] = slot_position

    def set_text(self, rows: Mapping[str, NDArray[np.generic]]) -> None:
        """Take a text; see ``Engine.set_text``."""
        for name, buffer in self._text.items():
            buffer[:] = rows[name]

    def rotate_keys(self, angles: NDArray[np.float64], live: int) -> None:
        """Turn cached keys; see ``Engine.rotate_keys``."""
        for name, buffer in self.buffers.items():
            if name.startswith("key"):
                rotate_pairs(buffer[:live], angles)

    def evaluate(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Run the graph on given inputs; see ``Engine.evaluate``."""
        return dict(zip(outputs, self._session.run(list(outputs), dict(feeds)), strict=True))

    def memory_used(self) -> int:
        """None of a device."""
        return 0

    def close(self) -> None:
        """Give the memory back."""
        self._session = None
        self.buffers.clear()


class PlainPrefix(PrefixState):
    """Steps as arrays that are fed anew each time, nothing of them bound; see ``Engine``."""

    def send(self, steps: Steps, parts: Sequence[int] | None = None) -> None:
        """Take the steps to run next; see ``Engine.send``."""
        del parts
        self._steps, self._next = steps, 0

    def step(self) -> None:
        """Run one pass; see ``Engine.step``."""
        steps, n = self._steps, self._next
        self._next += 1
        rows = slice(steps.offsets[n], steps.offsets[n + 1])
        changed = slice(steps.update_offsets[n], steps.update_offsets[n + 1])
        self.slot_position[steps.update_slots[changed]] = steps.update_positions[changed]
        feeds: dict[str, NDArray[Any]] = {
            "token_buffer": self.token_buffer,
            "sources": steps.sources[rows],
            "positions": steps.positions[rows],
            "slot_position": self.slot_position,
            "write_index": steps.write_index[n : n + 1].astype(np.int64),
            "logit_rows": steps.decoded[steps.decode_offsets[n] : steps.decode_offsets[n + 1]],
            **self._text,
        }
        self._logits = self.forward(feeds, int(steps.live[n]))

    def forward(self, feeds: Mapping[str, NDArray[Any]], live: int) -> Float:
        """Run the graph and update the K/V rows; logits [R, V].

        Args:
            feeds: arrays by input, the K/V rows apart.
            live: slots in use.
        """
        raise NotImplementedError

    def draw(self) -> None:
        """Draw tokens from the logits; see ``Engine.draw``."""
        places, ids = self._sampler.draw(self._logits, self._steps, self._next - 1)
        self.token_buffer[places] = ids

    def logits(self) -> Float:
        """Of the last step; see ``Engine.logits``."""
        return self._logits

    def watched(self) -> Mapping[str, NDArray[Any]]:
        """Nothing."""
        return {}


class PrefixEngine(PrefixState):
    """Sequence-major K/V buffers [S, G, D], of which each step binds the live prefix as input and output.

    The graph scatters a step's rows into the bound input; because the output is bound to the same memory,
    ONNX Runtime writes in place and copies nothing.

    Args:
        bundle: with a prefix graph.
        capacity: slots of the buffers.
        tokens: size of the token buffer.
        options: of ONNX Runtime.
        watch: further outputs of the graph to hand out after every step.
    """

    def __init__(
        self,
        bundle: Bundle,
        capacity: int,
        tokens: int,
        options: CpuOptions,
        *,
        watch: Sequence[str] = (),
    ) -> None:
        manifest = bundle.manifest
        graph = manifest.graph(Form.PREFIX)
        super().__init__(manifest, -(-capacity // GRANULE) * GRANULE, tokens, MAX_WIDTH)
        digest = graph_digest(bundle, graph) if options.prepack else ""
        options = options.suiting(graph.precision)
        self._session = open_session(bundle.file(graph.file), digest, options)
        self._binding = self._session.io_binding()
        self._write_index = np.zeros(1, np.int64)
        self._logits = np.zeros((MAX_WIDTH, manifest.output_vocabulary), np.float32)
        self._fed = {name: np.zeros(MAX_WIDTH, np.int32) for name in ("sources", "positions", "logit_rows")}
        self._addresses: dict[int, int] = {}
        self._bound = self._bound_width = self._bound_rows = -1  # nothing yet, not even an empty step
        self._bind("token_buffer", self.token_buffer)
        self._bind("write_index", self._write_index)
        self._bind_rows("logits", self._logits, MAX_WIDTH, output=True)
        for name, buffer in self._text.items():
            self._bind(name, buffer)
        self._watch = tuple(watch)

    def send(self, steps: Steps, parts: Sequence[int] | None = None) -> None:
        """Take the steps to run next; see ``Engine.send``."""
        del parts
        self._steps, self._next = steps, 0
        self._offsets, self._draws = steps.offsets.tolist(), steps.decode_offsets.tolist()
        self._updates = steps.update_offsets.tolist()
        self._starts, self._live = steps.write_index.tolist(), steps.live.tolist()

    def step(self) -> None:
        """Run one pass; see ``Engine.step``."""
        steps, n = self._steps, self._next
        self._next += 1
        first, last = self._offsets[n], self._offsets[n + 1]
        drawn, draws = self._draws[n], self._draws[n + 1]
        changed = slice(self._updates[n], self._updates[n + 1])
        self.slot_position[steps.update_slots[changed]] = steps.update_positions[changed]
        self._bind_prefix(-(-self._live[n] // GRANULE) * GRANULE)
        width, rows = last - first, draws - drawn
        self._bind_frontier(width, rows)
        self._write_index[0] = self._starts[n]
        self._fed["sources"][:width] = steps.sources[first:last]
        self._fed["positions"][:width] = steps.positions[first:last]
        self._fed["logit_rows"][:rows] = steps.decoded[drawn:draws]
        self._session.run_with_iobinding(self._binding)

    def draw(self) -> None:
        """Draw tokens from the logits; see ``Engine.draw``."""
        places, ids = self._sampler.draw(self.logits(), self._steps, self._next - 1)
        self.token_buffer[places] = ids

    def logits(self) -> Float:
        """Of the last step; see ``Engine.logits``."""
        return self._logits[: self._bound_rows]

    def watched(self) -> Mapping[str, NDArray[Any]]:
        """Further outputs; see ``Engine.watched``."""
        values = self.outputs
        first = len(values) - len(self._watch)  # outputs come in the order in which they were first bound
        return {name: value.numpy() for name, value in zip(self._watch, values[first:], strict=True)}

    @override
    def close(self) -> None:
        super().close()
        self._binding = None
        self._addresses.clear()

    def _bind_prefix(self, length: int) -> None:
        if length == self._bound:
            return
        for name, buffer in self.buffers.items():
            self._bind_rows(f"past_{name}", buffer, length)
            self._bind_rows(f"present_{name}", buffer, length, output=True)
        self._bind_rows("slot_position", self.slot_position, length)
        self._bound = length

    def _bind_frontier(self, width: int, rows: int) -> None:
        if width != self._bound_width:
            self._bind_rows("sources", self._fed["sources"], width)
            self._bind_rows("positions", self._fed["positions"], width)
        if rows != self._bound_rows:
            self._bind_rows("logit_rows", self._fed["logit_rows"], rows)
            self._bind_rows("logits", self._logits, rows, output=True)
        for name in self._watch:  # their size follows the step's: the memory is ONNX Runtime's
            self._binding.bind_output(name, "cpu")
        self._bound_width, self._bound_rows = width, rows

    def _bind_rows(self, name: str, buffer: NDArray[Any], rows: int, *, output: bool = False) -> None:
        """Bind the first rows of a buffer that lives as long as the engine; its address is looked up once."""
        if (address := self._addresses.get(id(buffer))) is None:
            address = self._addresses[id(buffer)] = buffer.ctypes.data
        bind = self._binding.bind_output if output else self._binding.bind_input
        bind(name, "cpu", 0, buffer.dtype, (rows, *buffer.shape[1:]), address)

    def _bind(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    @property
    def outputs(self) -> list[onnxruntime.OrtValue]:
        """Values bound to the outputs of the last step, in the order in which they were first bound."""
        values: list[onnxruntime.OrtValue] = self._binding.get_outputs()
        return values
