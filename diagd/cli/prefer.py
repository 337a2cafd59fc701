"""``diagd prefer``: tune a bundle to the better of its own rollouts, if that makes it better."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from diagd.bundle import Bundle
from diagd.bundle.files import write_text
from diagd.bundle.targets import check_distinct, file_target
from diagd.cli import terminal
from diagd.cli.options import Verb
from diagd.errors import UsageError, require
from diagd.options import File, Flag, checked, flag, positional, setting
from diagd.progress import Progress, is_first
from diagd.runtime.text import read_embeddings
from diagd.tuning.options import PreferOptions, PreferTraining, check_device, mixture

if TYPE_CHECKING:
    from diagd.tuning.prefer import PreferReport
    from diagd.tuning.reward import Change

EXAMPLES = """examples:
  diagd prefer crafter-3m.diagd --data recordings --output preferred.diagd
  diagd prefer crafter-3m.diagd --data recordings --decoder k=1,chained --order k=1,chained k=1,serial \\
    --report prefer.json --set resume=prefer.kept --output preferred.diagd
  diagd prefer mineworld.diagd --data clips/ --set valid=held/ --device cuda --set backend=cuda \\
    --output preferred.diagd

Several rollouts are made behind each of many prefixes, all under the actions that were recorded there, by
--decoder: the one that the model will be used with. Each is scored by what can be counted in its tokens:
 followed   the action can be read off the frames, by a probe that was trained on --data      40 %
 consistent as many cells come from the frame before, all moved alike, as in true frames       20 %
 known      ids are where true frames have them                                                15 %
 likelihood neither less nor more likely than true frames are                                  15 %
 dynamics   as many cells change as true frames change under that action                       10 %
The best of a context is then preferred to its worst (DPO, low-rank updates, the model itself as reference).
Twice more the same steps are spent otherwise: on the best rollouts alone, and on more true windows.

A gate compares all three with the model, on contexts that were held out: actions followed must be up, the
likelihood of true frames within 1 %, dynamics, variety and known ids not worse. What passes and gains most is
written. If nothing passes, the figures are printed, nothing is written, and the exit code is 1.
--data is a folder of recordings or clips, or a .npy token stream, as for `diagd align`. Rollouts are made by
--workers N processes or on a Ray --cluster, the same ones for any number; torchrun trains with several.
"""


REPORT = b'{\n "decoder"'
"""How a report begins."""


@checked
class PreferVerb:
    """What is tuned, on what, and how."""

    bundle: File = positional("it stays as it is")
    data: File = flag("recordings, clips or a .npy token stream")
    output: File = flag("bundle to write")
    decoder: str | None = flag("of the rollouts: ntp, jacobi or an order (default: the bundle's own)", None)
    order: tuple[str, ...] = flag(
        "of decoding that is trained for, one or more, as in align", ("k=1 chained",), Flag(count="+")
    )
    report: File | None = flag(".json file of all figures", None)
    raster: float = setting("share of next-token windows", 0.4, ge=0, le=1)
    valid: File | None = setting("data for the gate (default: the last fifth of --data)", None)
    text: File | None = setting("text embeddings of --data, for models that read text", None)
    resize: bool = setting("resize pictures of clips of another size", False)
    preference: PreferOptions = PreferOptions()
    training: PreferTraining = PreferTraining()


def run(options: PreferVerb) -> None:
    """Tune, judge, and write what is better."""
    require("torch", extra="export", purpose="fine-tune a model")
    from diagd.tuning.align import check_resume
    from diagd.tuning.prefer import TUNED, Material, NotBetterError, prefer, split
    from diagd.tuning.source import Source

    check_device(options.training.device)
    source = replace(Source.open(str(options.bundle), None), resize=options.resize)
    if not isinstance(source.what, Bundle):
        raise UsageError(f"{options.bundle} is no bundle, which rollouts need: diagd export makes one of it")
    read = {"--data": options.data, "--set text": options.text, "--set valid": options.valid}
    source.check_output(options.output, read)
    if options.report is not None:
        file_target(options.report, (".json",), "--report", REPORT)
    check_resume(options.training.resume, TUNED)
    check_distinct({"--output": options.output, "--report": options.report})
    shares = mixture(options.order, options.raster, source.config.layout)
    frames = options.preference.prompt + options.preference.frames
    windows = source.windows(options.data, frames)
    text = read_embeddings(options.text) if options.text else None
    held = source.windows(options.valid, frames) if options.valid else None
    material = Material(windows, held, text) if held is not None else Material(*split(windows), text)
    training = replace(options.training, shares=shares)
    progress, console = Progress(terminal.console()), terminal.console()
    try:
        found = prefer(
            source.what, material, options.preference, training, options.decoder, options.output, progress
        )
    except NotBetterError as error:
        _print(options, error.report)
        raise
    _print(options, found)
    console.print(f"{found.chosen} gains most: {options.output}")


def _print(options: PreferVerb, report: PreferReport) -> None:
    console = terminal.console()
    if probe := report.probe:
        console.print(
            f"the gate's probe reads {probe.right:.1%} of the actions of true frames (always the commonest: "
            f"{probe.commonest:.1%})"
        )
    best, mean, worst = report.scores
    console.print(
        f"{report.contexts} contexts by {report.decoder}: {report.pairs} pairs; scores, best {best:.3f}, "
        f"mean {mean:.3f}, worst {worst:.3f}"
    )
    choice, gained = report.choice, report.choice.gained
    console.print(
        f"scores of a context agree with those by the gate's probe to {choice.agreement:.2f}; what has to "
        f"rise: rollouts {gained.before:.4f}, the best of each context {gained.after:.4f} "
        f"[{gained.low:+.4f}, {gained.high:+.4f}], true frames {choice.truth:.4f}"
    )
    names = list(next(iter(report.verdicts.values())).changes)
    heads = "trained on", *("rise of NLL" if name == "truth" else name for name in names), "gate"
    rows = (
        (
            way,
            *(_cell(name, verdict.changes[name]) for name in names),
            "; ".join(verdict.breaches) or "passed",
        )
        for way, verdict in report.verdicts.items()
    )
    terminal.print_table(console, heads, rows, "before -> after [95 % interval of the difference]")
    if options.report is not None and is_first():
        write_text(options.report, json.dumps(asdict(report), indent=1) + "\n")


def _cell(name: str, change: Change) -> str:
    digits = "+.2%" if name == "truth" else "+.4f"
    return f"{change.before:.4f} -> {change.after:.4f}\n[{change.low:{digits}}, {change.high:{digits}}]"


VERB = Verb(PreferVerb, run, EXAMPLES)
