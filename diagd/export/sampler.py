"""The sampling rules of ``diagd.runtime.sampling`` as a graph: no sort, no TopK, no loop, no limit on k.

Top-k and top-p keep the ids above a threshold. The threshold is found by narrowing all of float32: first its
binade, then the place inside it down to neighbouring floats, by a fixed number of rounds that each compare
the row with a few points at once. The draw is the inverse CDF of the supplied uniform number in order of id.

Nothing here is a constant tensor, so the module can be traced on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

_BLOCK: Final = 128  # ids a partial sum of the draw covers
_BITS: Final = 3  # of the threshold settled by a round, with 2**_BITS - 1 comparisons an id
_BINADES: Final = 512
_BINADE_OF_ZERO: Final = 255
_MANTISSA_BITS: Final = 23


class GraphSampler(nn.Module):
    """Draws one token a row inside the step graph."""

    def __init__(self, *, keep_crossing: bool = True) -> None:
        """``keep_crossing``: top-p keeps the id at which the cumulated probability crosses p."""
        super().__init__()
        self.keep_crossing = keep_crossing

    def forward(
        self,
        logits: Tensor,
        uniforms: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        low: Tensor,
        high: Tensor,
    ) -> Tensor:
        """Draw.

        Args:
            logits: float32 [W, V].
            uniforms: float32 [W] in (0, 1).
            temperature: float32 []; 0 takes the largest logit, the lowest id of equals.
            top_k: int32 []; 0 keeps all.
            top_p: float32 []; 1 keeps all.
            low: int32 [W], first id each row may take.
            high: int32 [W], one past the last id each row may take.

        Returns:
            int32 [W] ids; of a row without any finite logit, some id of the vocabulary.
        """
        ids = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
        inside = (ids >= low.unsqueeze(1)) & (ids < high.unsqueeze(1))
        allowed = torch.where(inside, logits, -torch.inf)
        weights = self.kept_weights(allowed, temperature, top_k, top_p)
        greedy = _first(allowed == allowed.amax(1, keepdim=True))
        tokens = torch.where(temperature == 0, greedy, _draw(weights, uniforms))
        return tokens.clamp(max=logits.shape[1] - 1)

    def kept_weights(self, logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
        """Unnormalised probabilities [W, V] after temperature, top-k and top-p; 0 where an id is not kept."""
        top = logits.amax(1, keepdim=True)
        weights = torch.exp((logits - top) / torch.where(temperature == 0, 1.0, temperature))
        spare = torch.where(top_k > 0, (top_k - 1).to(logits.dtype), torch.inf)
        weights = torch.where(logits > _threshold(logits, weights.new_ones(1, 1), spare), weights, 0.0)
        share = torch.where(top_p < 1, top_p * weights.sum(1, keepdim=True), torch.inf)
        floor = _threshold(logits, weights, share, inclusive=not self.keep_crossing)
        return torch.where((logits > floor) | (logits == top), weights, 0.0)


def _threshold(values: Tensor, weights: Tensor, allowed: Tensor, *, inclusive: bool = False) -> Tensor:
    """Largest float that still leaves too much above it: ids with a greater value are kept.

    Args:
        values: float32 [W, V].
        weights: float32, broadcastable to [W, V].
        allowed: float32, broadcastable to [W, 1]; more than this is too much.
        inclusive: what lies at the point counts as above it.

    Returns:
        float32 [W, 1]; -inf if nothing is too much. Values under -2**127 are taken for equal.
    """

    def too_much(points: Tensor) -> Tensor:
        row, point = values.unsqueeze(1), points.unsqueeze(2)
        above = row >= point if inclusive else row > point
        mass = torch.where(above, weights.unsqueeze(1), 0.0).sum(2)
        return (mass > allowed).to(values.dtype).sum(1, keepdim=True)

    binade = torch.zeros_like(values[:, :1])
    width = _BINADES
    for branches in _rounds(_BINADES.bit_length() - 1):
        width //= branches
        binade = binade + width * too_much(_binade_start(binade + width * _branches(values, branches)))
    start = _binade_start(binade)
    step = (_binade_start(binade + 1) - start).clamp(max=2.0**127)
    for branches in _rounds(_MANTISSA_BITS):
        step = step / branches
        start = start + step * too_much(start + step * _branches(values, branches))
    return start


def _rounds(bits: int) -> Iterator[int]:
    """Branches of each round that together settle this many bits."""
    while bits > 0:
        yield 1 << min(bits, _BITS)
        bits -= _BITS


def _branches(like: Tensor, branches: int) -> Tensor:
    return torch.arange(1, branches, dtype=like.dtype, device=like.device)


def _binade_start(index: Tensor) -> Tensor:
    """Lowest float of a binade: -inf, -2**127, ..., -2**-126, 0, 2**-126, ..., 2**127, inf."""
    offset = index - _BINADE_OF_ZERO
    return offset.sign() * torch.exp2(offset.abs() - 127)


def _draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """First id [W] at which the cumulated weight exceeds the row's uniform share, by blocks of ids."""
    rows, ids = weights.shape
    blocks = functional.pad(weights, (0, -ids % _BLOCK)).view(rows, -1, _BLOCK)
    sums = blocks.sum(2)
    ends = sums.cumsum(1)
    target = uniforms.unsqueeze(1) * ends.amax(1, keepdim=True)
    block = _first_beyond(ends, sums, target)
    index = block.long().clamp(max=blocks.shape[1] - 1).unsqueeze(1)
    before = ends.gather(1, index) - sums.gather(1, index)
    inner = blocks.gather(1, index.unsqueeze(2).expand(-1, -1, _BLOCK)).squeeze(1)
    return block * _BLOCK + _first_beyond(inner.cumsum(1), inner, target - before)


def _first_beyond(cumulated: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    """First column [W] of positive weight above the target; where rounding leaves none, the last of them."""
    ends = torch.where(weights > 0, cumulated, 0.0)
    return _first((ends > target) | (ends == ends.amax(1, keepdim=True)))


def _first(chosen: Tensor) -> Tensor:
    """int32 [W], first true column of [W, n]; n where there is none."""
    columns = torch.arange(chosen.shape[1], dtype=torch.int32, device=chosen.device)
    return torch.where(chosen, columns, chosen.shape[1]).amin(1)
