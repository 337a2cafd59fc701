"""``diagd eval``: the quality of a world model under several schedules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from diagd.bundle import Bundle
from diagd.bundle.manifest import MANIFEST_NAME
from diagd.bundle.targets import folder_target
from diagd.cli import terminal
from diagd.cli.generate import encode_text
from diagd.cli.options import Verb
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import UsageError
from diagd.runtime.options import SessionOptions
from worlds.options import EvalRun

if TYPE_CHECKING:
    from worlds.metrics import Estimate

Found = TypeVar("Found")
WORLD = "world"
"""Family of the worlds that `diagd world train` makes, whose recordings are of their own kind."""

_ENGINE = "precision backend threads who"

EXAMPLES = """examples:
  diagd world collect recordings --episodes 40 --seed 100000
  diagd eval crafter-3m.diagd --data recordings --output quality
  diagd eval crafter-3m.diagd --precision int8 --data recordings --output quality
  diagd eval big.diagd --data recordings --output speed --decoders "next token" "k=1 chained" jacobi draft \\
    --set drafter=small.diagd --set frames=8
  diagd eval made/ --data clips/ --output quality --network lpips.onnx --network fvd.onnx --set skip=9
  diagd eval made/ --data clips/ --output quality --set dynamics=idm.onnx
  diagd eval wham.diagd --data episodes/ --output quality --order k=1,serial k=2,serial
  diagd eval trained/ --data recordings --output quality --order k=1,chained k=2,d=28 --set rollouts=200

MODEL is a bundle (decoded on its engine, recordings encoded by its own encoder) or a folder that `diagd world
train` wrote. The recording must not have been trained on. Writes eval.json and contact.png; every figure has
its standard error.

MODEL may also be a folder of videos, each judged against the recording of its name in --data: PSNR, SSIM,
what your networks say (two pictures: LPIPS; clips: FVD; pictures: FID), and MineWorld's actions as a network
of inverse dynamics sees them. --set skip=N leaves out the prompt. Of the bundle of a released model, --data
is a folder of clips, videos with .jsonl or episodes: the likelihood of their tokens by order of decoding,
under --set text=FILE where it attends to one.
Both write eval.json and eval.csv.

--workers N has that many processes do the passes, or judge the videos, of one thread each, and --cluster
ADDRESS the nodes of a Ray cluster (model and data in the same place on each): the result is the same for any
number of them.

--decoders compares speed and quality instead: orders, jacobi, and draft, which stands for the drafter alone,
the target alone, nine bars between and its controls. Writes pareto.json and pareto.png.
"""


def run(options: EvalRun) -> int:
    """Measure, write and print."""
    from diagd.export.families.world import DESCRIPTION
    from worlds.videos import videos_in

    is_model = any((options.model / name).is_file() for name in (MANIFEST_NAME, DESCRIPTION))
    if options.model.is_dir() and not is_model and videos_in(options.model):
        return _judge_videos(options)
    if (options.model / MANIFEST_NAME).is_file():
        bundle = Bundle.open(options.model)
        if bundle.manifest.family != WORLD:
            return _judge_clips(options, bundle)
    if options.decoders:
        return _compare(options)
    _check_used(options, "order long_frames long_rollouts probe_steps networks geometry options", _ENGINE)
    folder_target(options.output, {"eval.json": b'"schedules"'}, "an evaluation")

    from worlds.geometry import UNKNOWN_GEOMETRY
    from worlds.report import scores_table
    from worlds.run_eval import run_eval

    console, scores = terminal.console(), _measured(partial(run_eval, options))
    console.print(scores_table(scores))
    if any(score.geometry is None for score in scores):
        console.print(
            "actions followed, walks and invalid tiles are read off the geometry of the world, and "
            f"{UNKNOWN_GEOMETRY}; the other figures hold for any world"
        )
    console.print(f"wrote {options.output / 'eval.json'} and {options.output / 'contact.png'}")
    return 0


def _judge_videos(options: EvalRun) -> int:
    from worlds.videos import compare_folders

    _check_used(options, "folders networks threads who")

    def measure(report: Callable[[str], None]) -> dict[str, Estimate]:
        return compare_folders(
            *(options.model, options.data, options.folders, options.networks),
            *(report, options.who, _threads(options)),
        )

    return _figures(options, measure, {"networks": [path.name for path in options.networks]})


def _judge_clips(options: EvalRun, bundle: Bundle) -> int:
    from worlds.likelihood import forced_likelihood

    _check_used(options, "order options condition resize", _ENGINE)
    text = options.condition.embeddings(bundle.manifest, encode_text)
    running = SessionOptions(options.precision, options.backend, cpu=CpuOptions(_threads(options)))

    def measure(report: Callable[[str], None]) -> dict[str, Estimate]:
        return forced_likelihood(
            *(bundle, options.data, options.order, options.options, running, report, options.who, text),
            resize=options.folders.resize,
        )

    return _figures(options, measure, {"options": asdict(options.options)})


def _check_used(options: EvalRun, *used: str) -> None:
    """Refuse (UsageError) what is told but not asked for by what is evaluated."""
    told, usual = options, EvalRun(options.model, options.data, options.output)
    names = {"model", "data", "output", *" ".join(used).split()}
    for field in fields(EvalRun):
        given, default = getattr(told, field.name), getattr(usual, field.name)
        parts = [part.name for part in fields(given)] if is_dataclass(given) else []
        changed = [name for name in parts if getattr(given, name) != getattr(default, name)]
        for name in changed or [field.name] * (given != default):
            if not names & {field.name, name}:
                raise UsageError(f"'{name}' has no effect on what is evaluated here; leave it out")


def _threads(options: EvalRun) -> int:
    """Of each worker: one, so that sums have the same order wherever they are taken."""
    return 1 if options.who.is_asked else options.threads


def _figures(
    options: EvalRun, measure: Callable[[Callable[[str], None]], dict[str, Estimate]], extra: dict[str, Any]
) -> int:
    """Measure, write and print figures that have a name each."""
    from worlds.report import figures_table, write_figures

    folder_target(options.output, {"eval.json": b'"figures"'}, "an evaluation")
    console, figures = terminal.console(), _measured(measure)
    write_figures(options.output, figures, {"model": options.model.name} | extra)
    console.print(figures_table(figures))
    console.print(f"wrote {options.output / 'eval.json'} and {options.output / 'eval.csv'}")
    return 0


def _measured(measure: Callable[[Callable[[str], None]], Found]) -> Found:
    """What is found, while the console says what is measured."""
    with terminal.console().status("measuring") as status:
        return measure(lambda name: status.update(f"measuring {name}"))


def _compare(options: EvalRun) -> int:
    _check_used(options, "decoders drafts geometry options", _ENGINE)
    folder_target(options.output, {"pareto.json": b'"decoders"'}, "a comparison of decoders")

    from worlds.pareto import points_table
    from worlds.run_eval import run_pareto

    console, points = terminal.console(), _measured(partial(run_pareto, options))
    console.print(points_table(points))
    console.print(f"wrote {options.output / 'pareto.json'} and {options.output / 'pareto.png'}")
    return 0


VERB = Verb(EvalRun, run, EXAMPLES)
