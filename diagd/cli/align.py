"""``diagd align``: fine-tune a model to the visibility and the seeds of decoding schedules."""

from __future__ import annotations

from dataclasses import replace

from diagd.bundle.targets import check_distinct
from diagd.cli import terminal
from diagd.cli.options import Verb
from diagd.errors import require
from diagd.options import File, Flag, checked, flag, positional, setting
from diagd.progress import Progress
from diagd.runtime.text import read_embeddings
from diagd.tuning.options import AlignOptions, check_device, mixture

EXAMPLES = """examples:
  diagd align crafter-3m.diagd --data recordings --order k=1,chained k=2,serial --output aligned.diagd
  diagd align trained --data recordings --output aligned
  diagd align 300M_16f.ckpt --model mineworld-300m --data tokens.npy --output aligned.safetensors
  diagd align WHAM_200M.ckpt --model wham-200m --data episodes/ --set encoder=wham.diagd --set valid=held/ \\
    --device cuda --rate 1e-5 --set resume=wham.resume --output aligned.safetensors
  torchrun --nproc-per-node 4 -m diagd align trained --data recordings --device cuda --output aligned

SOURCE is a bundle, the folder of a trained world, or a checkpoint together with its --model.
--data is a folder of recordings made by `diagd world` (for worlds); a folder of clips, videos with .jsonl or
episodes, whose pictures the bundle encodes, or --set encoder=BUNDLE; or a .npy token stream of one video.
--output is of the same kind: a bundle, a world's folder, or a .safetensors for `diagd export --checkpoint`.
Under torchrun each process does its share of every batch: the same training, and the first one writes.
Several orders share the windows; next-token prediction keeps raster of them, with --set raster=1 all.
"""


@checked
class AlignVerb:
    """What is aligned, to what, on what."""

    source: str = positional("bundle, or weights: file, folder or hf://org/name[@revision]")
    data: File = flag("recordings, or a .npy token stream")
    output: File = flag("bundle, folder or .safetensors to write")
    model: str | None = flag("name of a checkpoint's model; bundles and folders say it", None)
    order: tuple[str, ...] = flag(
        "of decoding, one or more: 'k=1 chained', k=2,serial, k=1,d=15", ("k=1 chained",), Flag(count="+")
    )
    raster: float = setting(
        "share of next-token windows; 1 is training on next tokens alone", 0.4, ge=0, le=1
    )
    encoder: File | None = setting(
        "bundle that makes tokens of clips (default: the one that is aligned)", None
    )
    resize: bool = setting("resize pictures of clips of another size", False)
    valid: File | None = setting(
        "data that is not trained on, whose likelihood is told before and after", None
    )
    frames: int = setting("frames of a window", 4, ge=2)
    text: File | None = setting("text embeddings of --data, for models that read text", None)
    training: AlignOptions = AlignOptions()


def run(options: AlignVerb) -> None:
    """Align and write the new weights."""
    require("torch", extra="export", purpose="fine-tune a model")
    from diagd.tuning.align import Validation, check_resume
    from diagd.tuning.source import Source

    check_device(options.training.device)
    source = Source.open(options.source, options.model)
    read = {"--data": options.data, "--set text": options.text, "--set valid": options.valid}
    source.check_output(options.output, read)
    check_resume(options.training.resume)
    check_distinct({"--output": options.output, "--set resume": options.training.resume})
    shares = mixture(options.order, options.raster, source.config.layout)
    training = replace(options.training, shares=shares)
    text = read_embeddings(options.text) if options.text else None
    losses: list[float] = []
    with Progress(terminal.console()).count("aligning", training.steps) as advance:

        def report(step: int, loss: float) -> None:
            del step
            losses.append(loss)
            advance(1)

        source = replace(source, encoder=options.encoder, resize=options.resize)
        streams = source.windows(options.data, options.frames)
        valid = Validation(source.windows(options.valid, options.frames)) if options.valid else None
        output = source.align(streams, training, options.output, report, text, valid)
    span = max(1, len(losses) // 10)
    first, last = sum(losses[:span]) / span, sum(losses[-span:]) / span
    console = terminal.console()
    console.print(f"{training.steps} steps, loss {first:.4f} -> {last:.4f} nats a token: {output}")
    for name, (before, after) in (valid.likelihoods if valid else {}).items():
        console.print(f"{name}: {before:.4f} -> {after:.4f} nats a token of what was held out")


VERB = Verb(AlignVerb, run, EXAMPLES)
