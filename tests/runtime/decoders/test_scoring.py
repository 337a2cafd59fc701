"""Scores of proposed frames against arithmetic, and networks of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import diagd
from diagd.bundle.manifest import OwnLikelihood
from diagd.errors import UsageError
from diagd.runtime.decoders.draft import (
    LikelihoodScorer,
    PictureScorer,
    Proposal,
    open_scorer,
    worst_likelihood,
)
from diagd.runtime.sampling import SamplingSettings
from diagd.runtime.session import Session
from tests.runtime.test_stream import actions, prompt


class Pixels:
    """Pictures whose brightness is their token."""

    def decode(self, tokens: list[np.ndarray]) -> list[np.ndarray]:
        return [np.full((4, 6, 3), cells[0, 0] + n, np.uint8) for cells in tokens for n in (0, 100)]


def proposal(token: int = 7) -> Proposal:
    tokens = np.full((2, 10), token, np.int32)
    logits = np.zeros((20, 8), np.float32)
    logits[3, :] = np.log([4, 1, 1, 1, 1, 1, 1, 0.5])
    return Proposal(tokens, tokens.reshape(-1), logits)


def network(path: Path, channels_first: bool, kind: int) -> Path:
    """Mean of a picture."""
    shape: list[str | int] = ["n", 3, "h", "w"] if channels_first else ["n", "h", "w", 3]
    cast = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)
    mean = helper.make_node("ReduceMean", ["y", "axes"], ["score"], keepdims=0)
    axes = helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3])
    graph = helper.make_graph(
        [cast, mean],
        "mean",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n"])],
        [axes],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)
    return path


def test_the_worst_cells_decide() -> None:
    """One of twenty, the twentieth, has an eighth of the weight of its likeliest id."""
    found = proposal()
    assert worst_likelihood(found.tokens, found.logits) == pytest.approx(np.log(0.5 / 10.5))
    assert worst_likelihood(proposal(0).tokens, found.logits) == pytest.approx(np.log(1 / 8))


def test_scores_are_deviations_and_fall_again_for_what_is_too_likely() -> None:
    worst = worst_likelihood(proposal().tokens, proposal().logits)
    assert LikelihoodScorer(worst, 0.5)(proposal()) == pytest.approx(0)
    assert LikelihoodScorer(worst + 1, 0.5)(proposal()) == pytest.approx(-2)
    assert LikelihoodScorer(worst - 1, 0.5)(proposal()) == pytest.approx(2)
    assert LikelihoodScorer(worst - 5, 0.5)(proposal()) == pytest.approx(-2)  # ten deviations above


def test_the_targets_own_frames_are_measured_and_its_stream_left(small_bundle: Path) -> None:
    session = diagd.load(small_bundle, threads=1)
    prompt(session)
    stream, known = session.stream, session.stream.known
    scorer = LikelihoodScorer.measured(session, list(actions(session.layout, 6)), 6)
    assert session.stream is stream
    assert session.stream.known == known
    assert scorer.mean < 0 < scorer.deviation
    again = LikelihoodScorer.measured(session, list(actions(session.layout, 6)), 6)
    assert (again.mean, again.deviation) == (scorer.mean, scorer.deviation)


def test_what_a_calibration_recorded_is_taken_where_all_is_as_it_was(small_bundle: Path) -> None:
    session = diagd.load(small_bundle, threads=1)
    prompt(session)
    led, manifest = list(actions(session.layout, 4)), session.manifest
    own = LikelihoodScorer.measured(session, led)
    own_of: dict[str, Any] = {
        "precision": "fp32",
        "window": session.window,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "mean": -7.0,
        "deviation": 0.5,
    }
    rules = SamplingSettings()

    def found(sampling: SamplingSettings | None = rules, **changed: Any) -> tuple[float, float]:
        record = OwnLikelihood(**{**own_of, **changed})
        session.manifest = manifest.model_copy(update={"likelihoods": (record,)})
        scorer = open_scorer("likelihood", session, led, None, sampling)
        assert isinstance(scorer, LikelihoodScorer)
        return scorer.mean, scorer.deviation

    measured = found(window=session.window - 1)
    assert measured == found(precision="int8") == found(top_k=3) == (own.mean, own.deviation)
    assert found() == (-7.0, 0.5)
    colder = SamplingSettings(0.5)
    warm, cold = LikelihoodScorer.measured(session, led), found(colder)
    assert cold not in ((-7.0, 0.5), (warm.mean, warm.deviation))
    assert found(colder, temperature=0.5) == (-7.0, 0.5)


@pytest.mark.parametrize("channels_first", [True, False])
@pytest.mark.parametrize(("kind", "scale"), [(TensorProto.UINT8, 1.0), (TensorProto.FLOAT, 1 / 255)])
def test_the_worst_picture_of_a_frame_counts(
    tmp_path: Path, channels_first: bool, kind: int, scale: float
) -> None:
    path = network(tmp_path / "mean.onnx", channels_first, kind)
    scorer = PictureScorer(path, Pixels())  # type: ignore[arg-type]
    assert scorer(proposal(7)) == pytest.approx(7 * scale)


def test_a_package_may_bring_a_scorer(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "mine-1.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    (record / "entry_points.txt").write_text("[diagd.scorers]\nbeauty = beauty_of_mine:make\n")
    (tmp_path / "beauty_of_mine.py").write_text("def make(pixels):\n    return lambda proposal: pixels\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    session: Session = diagd.load(small_bundle, threads=1)
    assert open_scorer("beauty", session, None, 0.5)(proposal()) == 0.5  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="beauty, likelihood, onnx:PATH"):
        open_scorer("ugliness", session, None, None)


def test_scorers_that_are_none_are_named(small_bundle: Path, tmp_path: Path) -> None:
    session: Session = diagd.load(small_bundle, threads=1)
    with pytest.raises(UsageError, match="likelihood, onnx:PATH"):
        open_scorer("beauty", session, None, None)
    with pytest.raises(UsageError, match="has no tokenizer"):
        open_scorer("onnx:x.onnx", session, None, None)
    with pytest.raises(UsageError, match="no such scorer"):
        open_scorer(f"onnx:{tmp_path}/x.onnx", session, None, Pixels())  # type: ignore[arg-type]
    (tmp_path / "x.onnx").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="cannot be loaded"):
        open_scorer(f"onnx:{tmp_path}/x.onnx", session, None, Pixels())  # type: ignore[arg-type]
