"""Preference tuning: a model learns from the better of its own rollouts, and is kept if that made it better.

Beside preferences stand two plainer ways to spend the same steps: training on the best rollouts alone, and on
more true windows. Whichever of the three passes the gate and gains most is written.
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagd.bundle import Bundle, atomic_bundle, cache
from diagd.bundle.files import carry_over
from diagd.cluster import open_workers
from diagd.engines.engine import Float
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import QualityError, UsageError
from diagd.export.transformer import Transformer
from diagd.progress import Progress
from diagd.runtime.options import parse_decoder
from diagd.runtime.sampling import SamplingSettings
from diagd.schedule import Schedule, StreamLayout
from diagd.tuning import reward
from diagd.tuning.align import Ranks, TrainingState, beside, filled_text, together
from diagd.tuning.options import PreferOptions, PreferTraining
from diagd.tuning.preference import Lesson, tune
from diagd.tuning.rollouts import Rolling, Streams, open_roller, parts
from diagd.tuning.source import read_model, tuned_manifest, write_model
from diagd.tuning.teacher_forcing import ForcedPasses, forced_nll

SEEDS = 3
"""Of the random numbers that the gate looks at."""

_UNFILTERED = SamplingSettings(1.0, 0, 1.0)
"""How what is compared is drawn: from the law whose likelihood is trained. Rollouts that top-p has cut are
surer than the model, and training on them pulls it there, whichever are picked."""

_CHUNK = 8
"""Contexts that are rolled out and kept at a time."""


@dataclass(frozen=True)
class ProbeReport:
    """How well a probe reads the actions of true frames that it was not trained on.

    ``right`` is the share that it finds most probable, ``commonest`` what naming always the same one finds;
    ``likely`` and ``swapped`` are its mean probabilities of the action, and of that of another transition.
    """

    right: float
    commonest: float
    likely: float
    swapped: float


@dataclass(frozen=True)
class PreferReport:
    """What was found.

    Of ``contexts`` rolled out by ``decoder`` so many made ``pairs``; ``scores`` are means of the best, of all
    and of the worst rollouts of a context. ``probe`` is the gate's, None where the model takes no actions,
    and ``chosen`` what was written; None: none of the ways to spend the steps is better than the model.
    """

    decoder: str
    probe: ProbeReport | None
    contexts: int
    pairs: int
    scores: tuple[float, float, float]
    choice: reward.Choice
    verdicts: dict[str, reward.Verdict]
    chosen: str | None


class NotBetterError(QualityError):
    """Nothing passed the gate; ``report`` says why."""

    def __init__(self, report: PreferReport) -> None:
        reasons = "; ".join(f"{name}: {', '.join(v.breaches)}" for name, v in report.verdicts.items())
        super().__init__(
            f"no tuned model is better, so none is written ({reasons}); more --set judged= make smaller "
            "differences count, --set rate= and steps= change how far it goes"
        )
        self.report = report


@dataclass(frozen=True)
class Material:
    """Windows int64 [B, N] that are trained on, others that are judged, and the text they have in common."""

    train: Streams
    held: Streams
    text: Float | None = None


def split(windows: Streams) -> tuple[Streams, Streams]:
    """The last fifth of windows in order, and those before that share no frame with them."""
    first = len(windows) - max(1, len(windows) // 5)
    if first < 3:
        raise UsageError(f"{len(windows)} windows are too few to hold some out; give more --data")
    return windows[: first - 2], windows[first:]


def prefer(
    bundle: Bundle,
    material: Material,
    options: PreferOptions,
    training: PreferTraining,
    decoder: str | None,
    output: Path,
    progress: Progress,
) -> PreferReport:
    """Roll out, compare, train, judge, and write the best model if it passes the gate.

    Rollouts are kept in the cache and trainings in files beside ``training.resume``, so that the same call
    goes on where it was interrupted.

    Raises:
        NotBetterError: nothing passed the gate, and nothing is written.
        UsageError: windows, decoder or text do not fit the model.
        QualityError: the actions of true frames cannot be read, so nothing can be verified.
    """
    with together(training.device) as ranks:
        training = replace(training, device=ranks.device)
        run = _Run(bundle.at_precision(), material, options, training, decoder, progress, ranks)
        lessons, scores, choice, reference = run.collect()
        before = run.measure(run.bundle, run.model, reference)
        verdicts, states = dict[str, reward.Verdict](), list[TrainingState]()
        shared = None if options.who.cluster is None else output.resolve().parent  # which other nodes see
        with tempfile.TemporaryDirectory(dir=shared) as folder:
            for name, lesson in lessons.items():
                model, state = run.train(name, lesson)
                states.append(state)
                tuned = f"{TUNED[name]}, {training.steps} steps"
                made = write_model(run.bundle, model, Path(folder) / name, tuned_manifest(run.bundle, tuned))
                verdicts[name] = reward.Verdict.of(before, run.measure(Bundle.open(made), model, reference))
            chosen = _best(verdicts, reward.aim_of(before))
            if chosen is not None and ranks.is_first:
                with atomic_bundle(output) as directory:
                    carry_over(Path(folder) / chosen, directory)
    for state in states:
        state.remove()
    best, mean, worst = (float(part.mean()) for part in (scores.max(1), scores, scores.min(1)))
    report = PreferReport(
        *(run.spelled, run.probe_report, len(scores), len(lessons["preferences"].preferred)),
        *((best, mean, worst), choice, verdicts, chosen),
    )
    if chosen is None:
        raise NotBetterError(report)
    return report


TUNED = {
    "preferences": "tuned to preferences between rollouts",
    "winners": "trained on the best of its rollouts",
    "plain": "trained on more true windows",
}
"""Ways to spend the steps, and what is said of the result."""


def _best(verdicts: dict[str, reward.Verdict], aim: str) -> str | None:
    """What passed the gate and gains most."""
    changes = {name: verdict.changes[aim] for name, verdict in verdicts.items() if not verdict.breaches}
    return max(changes, key=lambda name: changes[name].after - changes[name].before, default=None)


class _Run:
    """One preference tuning: its contexts, and what scores rollouts and the result."""

    def __init__(
        self,
        bundle: Bundle,
        material: Material,
        options: PreferOptions,
        training: PreferTraining,
        decoder: str | None,
        progress: Progress,
        ranks: Ranks,
    ) -> None:
        self.ranks = ranks
        self.bundle, self.material, self.options, self.training = bundle, material, options, training
        self.progress, self.layout = progress, bundle.manifest.layout
        self.spelled = decoder or bundle.manifest.spelling
        parse_decoder(self.spelled, bundle.manifest)  # before any work
        self.model = read_model(bundle)
        most, frames = self.model.config.context_frames, self._frames
        if frames > most:
            asked = f"prompt {options.prompt} and frames {options.frames}"
            raise UsageError(f"{asked}: the model sees {most} frames; give fewer")
        random = np.random.default_rng(training.seed)
        self.contexts = _balanced(material.train, options.contexts, options.prompt, self.layout, random)
        self.judged = _balanced(material.held, options.judged, options.prompt, self.layout, random)
        self.probes = self._probes()
        self.probe_report = self._check_probe(self.probes[1]) if self.probes else None
        streams, logits, device = material.train, self._logits(self.model), training.device
        learned = reward.RewardModel.learn(self.model.config, streams, options.prompt, logits, device=device)
        self.rewards = [replace(learned, probe=probe) for probe in self.probes or (None,)]

    def collect(self) -> tuple[dict[str, Lesson], NDArray[np.float64], reward.Choice, reward.Figures]:
        """What to train on, scores [M, R] of all rollouts, what they tell, and figures they refer to."""
        options, count = self.options, self.options.rollouts
        rolled = self._roll_out(self.bundle, self.contexts, count, "rolling out", _UNFILTERED)
        flat = rolled.reshape(-1, rolled.shape[2])
        figures = self.rewards[0].figures(flat)
        again = self.rewards[-1].reread(figures, flat)
        scores, others = (self.rewards[0].score(f, f).reshape(-1, count) for f in (figures, again))
        aim = again["followed"].mean(1).reshape(-1, count) if "followed" in again else others
        preferences = Lesson.of_scores(rolled, scores, options.strength, options.anchor)
        lessons = {
            "preferences": preferences,
            "winners": Lesson.of_likelihood(preferences.preferred),
            "plain": Lesson.of_likelihood(self.material.train),
        }
        judge = self.rewards[-1]
        true = judge.reread({}, self.contexts) or judge.figures(self.contexts)
        truth = true["followed"] if "followed" in true else judge.score(true, figures)
        return lessons, scores, reward.Choice.of(scores, others, aim, float(truth.mean())), figures

    def train(self, name: str, lesson: Lesson) -> tuple[Transformer, TrainingState]:
        """A tuned copy of the model, and the state of its training."""
        resume = self.training.resume
        training = replace(self.training, resume=resume and beside(resume, name))
        model = copy.deepcopy(self.model)
        with self.progress.count(f"training on {name}", training.steps) as advance:
            state = tune(
                model,
                lesson,
                self.options.prompt,
                training,
                lambda *_: advance(1),
                text=self.material.text,
                ranks=self.ranks,
            )
        return model, state

    def measure(self, bundle: Bundle, model: Transformer, reference: reward.Figures) -> reward.Measures:
        """What the gate compares: by the other probe, on contexts that were held out."""
        rolled = self._roll_out(bundle, self.judged, SEEDS, "judging", self.options.sampling)
        raster = Schedule.next_token(self.layout)
        passes = ForcedPasses([raster], self._frames)
        nll = forced_nll(self._logits(model), passes, self.judged, 0, device=self.training.device)
        return reward.measures(self.rewards[-1], rolled, reference, np.nanmean(nll, axis=1, dtype=np.float64))

    @property
    def _frames(self) -> int:
        return self.options.prompt + self.options.frames

    def _logits(self, model: Transformer) -> Any:
        device = self.training.device
        return partial(model.to(device).eval(), text=filled_text(model, self.material.text, device))

    def _probes(self) -> list[reward.Probe]:
        """One that rewards and one that judges, which did not learn alike; none where nothing varies."""
        seen = reward.Transitions.of(self.material.train, self.layout)
        if not seen.vary:
            return []
        steps, seed = self.options.probe_steps, 2 * self.training.seed
        made = []
        for n, title in enumerate(("learning to read actions", "and the gate, likewise")):
            with self.progress.count(title, steps) as advance:
                ids = self.bundle.manifest.vocabulary
                fit = reward.Probe.fit(seen, ids, steps=steps, seed=seed + n, report=lambda _: advance(1))
                made.append(fit)
        return made

    def _check_probe(self, probe: reward.Probe) -> ProbeReport:
        true = reward.Transitions.of(self.material.held, self.layout)
        likely, right = probe.read(true)
        swapped, _ = probe.read(replace(true, led=np.random.default_rng(0).permutation(true.led)))
        found = ProbeReport(
            float(right.mean()), probe.commonest(true.led), float(likely.mean()), float(swapped.mean())
        )
        if not (found.right > found.commonest and found.likely > 1.1 * found.swapped):
            raise QualityError(
                f"a probe reads {found.right:.1%} of the actions of true frames, where the commonest action "
                f"is {found.commonest:.1%} of them: whether rollouts follow theirs cannot be verified; give "
                "more --data, or --set probe_steps="
            )
        return found

    def _roll_out(
        self, bundle: Bundle, contexts: Streams, count: int, title: str, sampling: SamplingSettings
    ) -> Streams:
        """Rollouts int64 [M, count, N] of contexts, by whoever does them, kept in the cache by and by."""
        items = [self._part(contexts[n : n + _CHUNK], n, count) for n in range(0, len(contexts), _CHUNK)]
        keys = [self._key(bundle, part, sampling) for part in items]
        if not self.ranks.is_first:
            self.ranks.wait()  # what the first made is in the cache
        made = {n: read for n, key in enumerate(keys) if (read := cache.read("rollouts", key)) is not None}
        missing = [n for n in range(len(items)) if n not in made]
        who, precision = self.options.who, bundle.manifest.precisions[0]
        backend, cpu = self.options.backend, CpuOptions(1 if who.is_asked else 0)
        how = self.spelled, self.options.prompt, sampling, self.material.text
        make = partial(open_roller, bundle.path.resolve(), precision, *how, backend=backend, cpu=cpu)
        with self.progress.count(title, len(items)) as advance:
            advance(len(made))
            with open_workers(make, who) as workers:
                for number, rolled in workers.map([items[n] for n in missing]):
                    by_context = rolled.reshape(count, -1, rolled.shape[1]).swapaxes(0, 1)
                    made[missing[number]] = by_context.astype("<i8").tobytes()
                    cache.write("rollouts", keys[missing[number]], made[missing[number]])
                    advance(1)
        if self.ranks.is_first:
            self.ranks.wait()
        whole = np.frombuffer(b"".join(made[n] for n in range(len(items))), "<i8").astype(np.int64)
        return whole.reshape(len(contexts), count, -1)

    def _part(self, contexts: Streams, first: int, count: int) -> Rolling:
        """Rollouts of one context apart, so that sessions side by side go back to the prompts they hold."""
        keys = [(self.training.seed, first + n, i) for i in range(count) for n in range(len(contexts))]
        seeds = tuple(int(np.random.SeedSequence(key).generate_state(1)[0]) for key in keys)
        return np.tile(contexts, (count, 1)), seeds

    def _key(self, bundle: Bundle, part: Rolling, sampling: SamplingSettings) -> str:
        """Of all that rollouts depend on."""
        options, text, (streams, seeds) = self.options, self.material.text, part
        told = repr((bundle.digest, self.spelled, options.prompt, sampling, options.backend, seeds))
        digest = hashlib.sha256(told.encode() + streams.tobytes() + (b"" if text is None else text.tobytes()))
        return digest.hexdigest()[:32]


def _balanced(
    windows: Streams, count: int, prompt: int, layout: StreamLayout, random: np.random.Generator
) -> Streams:
    """Contexts among windows, at most ``count``, the first action behind the prompt as evenly as can be."""
    _, led = parts(windows, layout)
    _, action, often = (
        np.unique(led[:, prompt], axis=0, return_inverse=True, return_counts=True)
        if layout.gap
        else (None, np.zeros(len(windows), int), np.array([len(windows)]))
    )
    chance = 1 / often[action.ravel()]
    picked = random.choice(len(windows), min(count, len(windows)), replace=False, p=chance / chance.sum())
    return windows[np.sort(picked)]
