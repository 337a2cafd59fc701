"""Greedy decoding as released with MineWorld, over the parameters of a ``Transformer``.

Keys and values lie in a static zero-filled buffer at their absolute position. A call writes the rows of all
its inputs, then a query at position p attends to slots 0..p: written or not, a slot that holds nothing is a
key of zero. Row starts are fed a stand-in at the slot of the last token of the row above, which is never
overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diagd.bundle.transformer import Axis
from diagd.export.transformer import Block, SwiGLU, Transformer
from diagd.schedule import StreamLayout

Mode = Literal["naive", "image", "video"]
Policy = Literal["prompt", "repeat"]
Cell = tuple[int, int, int]


class Released(NamedTuple):
    """Decoded tokens, int64 [frames, rows, columns], and the forward calls, the prompt's included."""

    tokens: NDArray[np.int64]
    calls: int


class StaticCache:
    """The network with its static cache; ``call`` is one forward pass."""

    def __init__(self, model: Transformer, slots: int) -> None:
        self.model, self.config = model, model.config
        shape = (self.config.layers, slots, self.config.kv_heads, self.config.head_size)
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)
        assert self.config.rotary is not None
        (axis,) = self.config.rotary.axes
        assert axis.axis is Axis.POSITION
        self.frequencies = torch.tensor(axis.frequencies, dtype=torch.float64)
        self.weights = [block for block in model.layers if isinstance(block, Block)]
        self.calls = 0

    @torch.no_grad()
    def call(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Logits [inputs, output_vocabulary]."""
        self.calls += 1
        at = torch.tensor(positions)
        x = self.model.embedding[torch.tensor(tokens)]
        for layer, block in enumerate(self.weights):
            x = x + self._attention(layer, normalised(x, block.attention_norm), at)
            forward = block.feed_forward
            assert isinstance(forward, SwiGLU)
            gate, up = (normalised(x, block.feed_forward_norm) @ forward.gate_up).chunk(2, dim=-1)
            x = x + (gate * torch.sigmoid(gate) * up) @ forward.down
        logits: Tensor = normalised(x, self.model.norm) @ self.model.head
        return logits

    def _attention(self, layer: int, x: Tensor, at: Tensor) -> Tensor:
        config, weights = self.config, self.weights[layer].attention
        sizes = [config.heads * config.head_size] + [config.kv_heads * config.head_size] * 2
        q, k, v = (part.unflatten(-1, (-1, config.head_size)) for part in (x @ weights.qkv).split(sizes, -1))
        q, k = self._rotated(q, at), self._rotated(k, at)
        self.keys[layer, at], self.values[layer, at] = k, v
        hidden = torch.arange(self.keys.shape[1]) > at[:, None]
        heads = []
        for head in range(config.heads):
            shared = head // (config.heads // config.kv_heads)
            scores = q[:, head] @ self.keys[layer, :, shared].T / config.head_size**0.5
            heads.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ self.values[layer, :, shared])
        return torch.cat(heads, dim=-1) @ weights.out

    def _rotated(self, x: Tensor, at: Tensor) -> Tensor:
        angles = at[:, None].double() * self.frequencies
        cosines, sines = angles.cos().float()[:, None], angles.sin().float()[:, None]
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cosines - b * sines, b * cosines + a * sines], dim=-1)


def normalised(x: Tensor, norm: torch.nn.Module) -> Tensor:
    """RMSNorm by its formula."""
    assert isinstance(norm, torch.nn.RMSNorm) and norm.eps is not None
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight


class ReleasedDecoder:
    """One clip: the tokens of the stream by position and the network that extends them."""

    def __init__(
        self,
        model: Transformer,
        prompt_tokens: Sequence[int],
        actions: Sequence[Sequence[int]],
        layout: StreamLayout,
        frames: int,
        sampled: range | None,
    ) -> None:
        assert layout.prefix == layout.before == 0
        self.layout, self.frames = layout, frames
        self.sampled = sampled or range(model.config.output_vocabulary)
        self.prompt_frames, rest = divmod(len(prompt_tokens) + layout.after, layout.frame_length)
        assert rest == 0
        stream = np.full(layout.frame_start(self.prompt_frames + frames), -1)
        stream[: len(prompt_tokens)] = prompt_tokens
        for frame, block in enumerate(actions[:frames]):
            start = self._first_cell(frame)
            stream[start - layout.after : start] = block
        self.stream = stream
        self.network = StaticCache(model, len(stream))

    def _first_cell(self, frame: int) -> int:
        return self.layout.frame_length * (self.prompt_frames + frame)

    def _position(self, cell: Cell) -> int:
        return self._first_cell(cell[0]) + cell[1] * self.layout.columns + cell[2]

    def _call(self, inputs: list[tuple[int, int]], cells: dict[int, Cell]) -> None:
        """Feed (token, position) pairs; ``cells`` maps the index of an input to the cell that it decodes."""
        tokens, positions = zip(*inputs, strict=True)
        logits = self.network.call([int(token) for token in tokens], positions)
        allowed = logits[:, self.sampled.start : self.sampled.stop]
        for index, cell in cells.items():
            self.stream[self._position(cell)] = self.sampled.start + int(allowed[index].argmax())

    def _span(self, first: int, stop: int) -> list[tuple[int, int]]:
        return [(self.stream[position], position) for position in range(first, stop)]

    def naive(self) -> None:
        """One cell a call; a frame's last token and the action block behind it are fed together."""
        fed = 0
        for frame in range(self.frames):
            for cell in range(self.layout.cells):
                target = self._first_cell(frame) + cell
                inputs = self._span(fed, target)
                self._call(inputs, {len(inputs) - 1: (frame, *divmod(cell, self.layout.columns))})
                fed = target

    def image(self, k: int, policy: Policy) -> None:
        """Diagonals inside a frame; frames one after another."""
        layout, fed = self.layout, 0
        for frame in range(self.frames):
            start = self._span(fed, self._first_cell(frame))
            self._call(start, {len(start) - 1: (frame, 0, 0)})
            for step in range(1, (layout.rows - 1) * k + layout.columns):
                self._diagonal({frame: step}, [], k, policy)
            fed = self._first_cell(frame) + layout.cells - 1

    def video(self, k: int, policy: Policy) -> None:
        """Diagonals through all frames; a new one starts when the last row before it holds k tokens.

        Its action block joins the call of the running rows; the last token of a frame is never fed.
        """
        layout = self.layout
        prompt = self._span(0, self._first_cell(0))
        self._call(prompt, {len(prompt) - 1: (0, 0, 0)})
        delay = layout.rows * k
        for step in range(1, (self.frames * layout.rows - 1) * k + layout.columns):
            steps = {frame: step - frame * delay for frame in range(self.frames)}
            block: list[tuple[int, int]] = []
            for frame in (frame for frame, own in steps.items() if own == 0):
                block = self._span(self._first_cell(frame) - layout.after, self._first_cell(frame))
            self._diagonal({frame: own for frame, own in steps.items() if own > 0}, block, k, policy)

    def _diagonal(self, steps: dict[int, int], block: list[tuple[int, int]], k: int, policy: Policy) -> None:
        """One query for every active row of the given frames, then the action block of a new frame."""
        inputs: list[tuple[int, int]] = []
        cells: dict[int, Cell] = {}
        for frame, step in steps.items():
            for row in range(self.layout.rows):
                column = step - row * k
                if 0 <= column < self.layout.columns:
                    cell = (frame, row, column)
                    cells[len(inputs)] = cell
                    token = (
                        self.stream[self._position(cell) - 1] if column else self._stand_in(cell, k, policy)
                    )
                    inputs.append((token, self._position(cell) - 1))
        if block:
            cells[len(inputs) + len(block) - 1] = (max(steps) + 1, 0, 0)
        self._call(inputs + block, cells)

    def _stand_in(self, cell: Cell, k: int, policy: Policy) -> int:
        frame, row, _ = cell
        if policy == "prompt":
            return int(self.stream[row * self.layout.columns - 1])
        return int(self.stream[self._position((frame, row - 1, k - 1))])


def decode_released(
    model: Transformer,
    prompt_tokens: Sequence[int],
    actions: Sequence[Sequence[int]],
    layout: StreamLayout,
    k: int,
    mode: Mode,
    policy: Policy,
    frames: int,
    sampled: range | None = None,
) -> Released:
    """Decode ``frames`` frames greedily.

    Args:
        model: float32, one-dimensional rotary positions, no slot embedding.
        prompt_tokens: the stream up to the last cell of the prompt, action blocks between frames included.
        actions: a block of ``layout.after`` tokens in front of each decoded frame, [frames, after].
        layout: only ``rows``, ``columns`` and ``after`` may be set.
        k: steps between row starts, 1..columns-1; ignored in naive mode.
        mode: "naive", "image" (serial frames) or "video" (frames delayed by rows * k steps).
        policy: stand-in of row starts: "prompt" (same place of the first prompt frame) or "repeat" (newest
            token of the row above).
        frames: how many.
        sampled: ids that may be decoded; None: the whole output vocabulary.
    """
    assert mode == "naive" or 1 <= k < layout.columns
    decoder = ReleasedDecoder(model, prompt_tokens, actions, layout, frames, sampled)
    if mode == "naive":
        decoder.naive()
    elif mode == "image":
        decoder.image(k, policy)
    else:
        decoder.video(k, policy)
    cells = decoder.stream.reshape(-1, layout.frame_length)[-frames:, : layout.cells]
    return Released(cells.reshape(frames, layout.rows, layout.columns), decoder.network.calls)
