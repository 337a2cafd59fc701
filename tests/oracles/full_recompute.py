"""Decoding by recomputing everything at every step, with an explicit mask: slow and obviously right.

Rows once fed stay in a list for ever, with their step. Row r sees row q if q was fed at the same step or
earlier, stands at a smaller or equal position, and was not void when r was fed. A seed is void once its step
is over; a frame is void once it leaves the window. One forward over all rows gives the logits of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diagd.export.transformer import FullAttention, Transformer
from tests.oracles.rows import Row


@dataclass
class Fed:
    """A row that was fed; ``void_from`` is the first step that no longer sees it."""

    token: int
    position: int
    step: int
    void_from: float = float("inf")


class FullRecompute:
    """Greedy decoder whose whole state is the list of fed rows; one instance decodes one stream.

    Args:
        model: the transformer; its positions must reach the end of the stream (see ``lengthened``).
        sampled: ids that may be decoded; None: the whole output vocabulary.
        window: frames kept, the one being decoded included; None: all.
        keep_seeds: leave the rows of seeds visible.
        empty_slots: count positions below a query at which it sees no row as keys and values of zero, as a
            static cache indexed by position does that hides nothing below the query.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        sampled: range | None = None,
        window: int | None = None,
        keep_seeds: bool = False,
        empty_slots: bool = False,
    ) -> None:
        self.model, self.layout = model, model.config.layout
        self.sampled = sampled or range(model.config.output_vocabulary)
        self.window, self.keep_seeds, self.empty_slots = window, keep_seeds, empty_slots
        self.fed: list[Fed] = []
        self.step = 0
        self.floor = self.layout.prefix

    def run(self, steps: Iterable[Sequence[Row]], tokens: NDArray[np.int64]) -> dict[int, Tensor]:
        """Decode into ``tokens`` [stream], which holds the known tokens by position.

        Raises:
            ValueError: a step feeds a token of a frame that has left the window.

        Returns:
            Position of each decoded cell -> its logits, float [output_vocabulary].
        """
        logits: dict[int, Tensor] = {}
        for rows in steps:
            decoded = self._step(rows, tokens)
            for position, cell in decoded.items():
                allowed = cell[self.sampled.start : self.sampled.stop]
                tokens[position] = self.sampled.start + int(allowed.argmax())
            logits |= decoded
        return logits

    def _step(self, rows: Sequence[Row], tokens: NDArray[np.int64]) -> dict[int, Tensor]:
        for row in rows:
            self._evict(row.sink)
        for row in rows:
            if self.layout.prefix <= row.position < self.floor:
                raise ValueError(
                    f"position {row.position} is fed behind the window, which starts at {self.floor}"
                )
            is_seed = row.source != row.position
            void_from = self.step + 1 if is_seed and not self.keep_seeds else float("inf")
            self.fed.append(Fed(int(tokens[row.source]), row.position, self.step, void_from))
        output = self._forward()[-len(rows) :]
        self.step += 1
        return {row.sink: output[n] for n, row in enumerate(rows) if row.sink >= 0}

    def _evict(self, sink: int) -> None:
        """Void the frames that leave the window when ``sink`` is the first cell of a frame."""
        frame, place = divmod(sink - self.layout.first_cell(0), self.layout.frame_length)
        if self.window is None or sink < 0 or place:
            return
        self.floor = self.layout.prefix + (frame - self.window + 1) * self.layout.frame_length
        for fed in self.fed:
            if self.layout.prefix <= fed.position < self.floor:
                fed.void_from = min(fed.void_from, self.step)

    def visible(self) -> Tensor:
        """Bool [rows, rows]: row r sees row q."""
        position = torch.tensor([fed.position for fed in self.fed])
        step = torch.tensor([fed.step for fed in self.fed])
        void_from = torch.tensor([fed.void_from for fed in self.fed])
        not_later = step[None, :] <= step[:, None]
        not_behind = position[None, :] <= position[:, None]
        not_void = void_from[None, :] > step[:, None]
        return not_later & not_behind & not_void

    @torch.no_grad()
    def _forward(self) -> Tensor:
        """Logits of every row fed so far, [rows, output_vocabulary]."""
        ids = torch.tensor([[fed.token for fed in self.fed]])
        positions = torch.tensor([fed.position for fed in self.fed])
        visible = self.visible()
        if not self.empty_slots:
            logits: Tensor = self.model(ids, positions, visible)
        else:
            form = AttentionWithEmptySlots(visible, positions)
            logits = self.model.states(ids, positions, form) @ self.model.head
        return logits[0]


class AttentionWithEmptySlots(FullAttention):
    """Every position up to a query's own that it sees no row at is one more key and value of zero."""

    def __init__(self, visible: Tensor, positions: Tensor) -> None:
        slots = int(positions.max()) + 1
        seen = torch.zeros(len(positions), slots, dtype=torch.bool)
        for row, row_sees in enumerate(visible):
            seen[row, positions[row_sees]] = True
        empty = ~seen & (torch.arange(slots) <= positions[:, None])
        super().__init__(torch.cat([visible, empty], dim=1))
        self.slots = slots

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention over the rows and the empty slots."""
        nothing = keys.new_zeros(keys.shape[0], self.slots, *keys.shape[2:])
        keys, values = torch.cat([keys, nothing], dim=1), torch.cat([values, nothing], dim=1)
        return super().attend(layer, queries, keys, values)


def lengthened(model: Transformer, frames: int) -> Transformer:
    """The same model with rotary tables for at least ``frames`` frames."""
    longer = Transformer(replace(model.config, context_frames=max(frames, model.config.context_frames)))
    longer.load_state_dict(model.state_dict())
    return longer.to(model.head.dtype).eval()
