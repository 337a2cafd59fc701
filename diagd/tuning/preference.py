"""Preferences between rollouts, and training on them: DPO (arXiv 2305.18290) for tokens of video.

Weights of pairs are VideoDPO's (arXiv 2412.14167, section 3.3). Both members of a pair have the same prefix
and the same actions, which are conditions; likelihoods are those at temperature 1 of the tokens behind them,
as means of a token, whatever drew them. The reference is the model without its low-rank updates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from diagd.errors import UsageError
from diagd.export.transformer import Transformer
from diagd.tuning import align
from diagd.tuning.options import PreferTraining
from diagd.tuning.rollouts import Streams
from diagd.tuning.teacher_forcing import window_nll

_BIN = 0.01
_CLIP = (0.2, 5.0)


@dataclass(frozen=True)
class Lesson:
    """What a model is trained on.

    Attributes:
        preferred: int64 [M, N].
        rejected: likewise, pair by pair; None trains on the likelihood of ``preferred`` alone.
        weights: float32 [M], of the pairs.
        strength: beta of DPO, on means of a token.
        anchor: share of the likelihood of ``preferred``, which DPO alone may lower with that of ``rejected``.
    """

    preferred: Streams
    rejected: Streams | None
    weights: NDArray[np.float32]
    strength: float
    anchor: float

    def windows(self, picked: NDArray[np.int64]) -> list[Streams]:
        """The picked windows: preferred, and rejected where there are."""
        both = (self.preferred, self.rejected)
        return [streams[picked] for streams in both if streams is not None]

    @classmethod
    def of_likelihood(cls, streams: Streams) -> Lesson:
        """Plain training on windows."""
        return cls(streams, None, np.ones(len(streams), np.float32), 0.0, 1.0)

    @classmethod
    def of_scores(
        cls, rolled: Streams, scores: NDArray[np.float64], strength: float, anchor: float
    ) -> Lesson:
        """Best against worst of each context, by ``scores`` [M, R], 0 to 1, of rollouts int64 [M, R, N].

        Raises:
            UsageError: the rollouts of every context score alike.
        """
        best, worst, rows = scores.argmax(1), scores.argmin(1), np.arange(len(scores))
        kept = rows[scores[rows, best] > scores[rows, worst]]
        if not len(kept):
            raise UsageError(
                "the rollouts of every context score alike, so none is preferred; give more --set rollouts= "
                "or --set frames="
            )
        best, worst = best[kept], worst[kept]
        weights = pair_weights(scores, scores[kept, best], scores[kept, worst])
        return cls(rolled[kept, best], rolled[kept, worst], weights, strength, anchor)

    @property
    def arrays(self) -> list[NDArray[np.generic]]:
        """All that it is, for a digest."""
        rejected = [] if self.rejected is None else [self.rejected]
        return [self.preferred, *rejected, self.weights, np.array([self.strength, self.anchor])]


def pair_weights(
    scores: NDArray[np.float64], best: NDArray[np.float64], worst: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Weights [M] of pairs by how rare their scores are among all ``scores``: mean 1, then clipped."""
    count, edges = np.histogram(scores, np.arange(0, 1 + 2 * _BIN, _BIN))
    chance = count / count.sum()
    of_best, of_worst = (chance[np.digitize(s, edges) - 1] for s in (best, worst))
    weights = chance.max() / np.sqrt(of_best * of_worst)
    clipped: NDArray[np.float32] = np.clip(weights / weights.mean(), *_CLIP).astype(np.float32)
    return clipped


def preference_loss(
    model: Tensor, reference: Tensor, weights: Tensor, strength: float, anchor: float
) -> Tensor:
    """The loss of pairs, a scalar, with ``weights`` [M]; see ``Lesson``.

    By ``model`` and ``reference`` are mean negative log-likelihoods [2, M], preferred and rejected.
    """
    gained = reference - model
    margin = strength * (gained[0] - gained[1])
    return -(weights * functional.logsigmoid(margin)).mean() + anchor * model[0].mean()


def tune(
    model: Transformer,
    lesson: Lesson,
    prompt: int,
    options: PreferTraining,
    report: align.Report | None = None,
    *,
    text: NDArray[np.float32] | None = None,
    ranks: align.Ranks | None = None,
) -> align.TrainingState:
    """Train low-rank updates in place and merge them; gives the state of the training, to be removed.

    Without rejected windows, a step takes twice as many preferred ones: equal steps are an equal budget. The
    first ``prompt`` frames of each window are known; the text is as in ``align``. ``ranks`` do it together,
    each its share of every batch; None: this process alone.
    """
    mixture = align.Mixture(model, lesson.preferred, options, prompt)
    model.to(options.device).train()
    trained, ranks = align.add_low_rank(model, options), ranks or align.Ranks(0, 1, options.device)
    filled = align.filled_text(model, text, options.device)
    nll, base_nll = (partial(window_nll, partial(one, text=filled)) for one in (ranks.wrapped(model), model))

    def loss(step: int) -> Tensor:
        picked, choice = mixture.draw(step, twice=lesson.rejected is None)
        mine = ranks.share(len(picked))
        share = ranks.size * len(picked[mine]) / len(picked)  # all that is summed is a mean over windows
        windows = lesson.windows(picked[mine])
        choices = choice[mine].tolist() * len(windows)
        batch = mixture.passes.batch(np.concatenate(windows), choices, options.device)
        found = nll(batch, autocast=options.autocast).view(len(windows), -1)
        if lesson.rejected is None:
            return share * found.mean()
        with torch.no_grad(), align.without_low_rank(model):
            reference = base_nll(batch, autocast=options.autocast).view_as(found)
        weights = torch.from_numpy(lesson.weights[picked[mine]]).to(found)
        return share * preference_loss(found, reference, weights, lesson.strength, lesson.anchor)

    state = align.TrainingState(options, lesson.arrays, trained, ranks)
    state.descend(loss, report)
    align.merged(model)
    return state
