"""``diagd eval``: the quality of a world model under several schedules."""

from __future__ import annotations

from diagd.bundle.targets import folder_target
from diagd.cli import terminal
from diagd.cli.options import Verb
from worlds.options import EvalRun

EXAMPLES = """examples:
  diagd world collect recordings --episodes 40 --seed 100000
  diagd eval crafter-3m.diagd --data recordings --output quality
  diagd eval crafter-3m.diagd --precision int8 --data recordings --output quality
  diagd eval big.diagd --data recordings --output speed --decoders "next token" "k=1 chained" jacobi draft \
    --set drafter=small.diagd --set frames=8
  diagd eval trained/ --data recordings --output quality --order k=1,chained k=2,d=28 --rollouts 200

MODEL is a bundle (decoded on its engine, recordings encoded by its own encoder) or a folder that `diagd world
train` wrote. The recording must not have been trained on. Writes eval.json and contact.png; every figure has
its standard error.

--decoders compares speed and quality instead: orders, jacobi, and draft, which stands for the drafter alone,
the target alone, nine bars between and its controls. Writes pareto.json and pareto.png.
"""


def run(options: EvalRun) -> int:
    """Measure, write and print."""
    if options.decoders:
        return _compare(options)
    folder_target(options.output, {"eval.json": b'"schedules"'}, "an evaluation")

    from worlds.geometry import UNKNOWN_GEOMETRY
    from worlds.report import scores_table
    from worlds.run_eval import run_eval

    console = terminal.console()
    with console.status("measuring") as status:
        scores = run_eval(options, lambda name: status.update(f"measuring {name}"))
    console.print(scores_table(scores))
    if any(score.geometry is None for score in scores):
        console.print(
            "actions followed, walks and invalid tiles are read off the geometry of the world, and "
            f"{UNKNOWN_GEOMETRY}; the other figures hold for any world"
        )
    console.print(f"wrote {options.output / 'eval.json'} and {options.output / 'contact.png'}")
    return 0


def _compare(options: EvalRun) -> int:
    folder_target(options.output, {"pareto.json": b'"decoders"'}, "a comparison of decoders")

    from worlds.pareto import points_table
    from worlds.run_eval import run_pareto

    console = terminal.console()
    with console.status("measuring") as status:
        points = run_pareto(options, lambda name: status.update(f"measuring {name}"))
    console.print(points_table(points))
    console.print(f"wrote {options.output / 'pareto.json'} and {options.output / 'pareto.png'}")
    return 0


VERB = Verb(EvalRun, run, EXAMPLES)
