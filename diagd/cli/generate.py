"""``diagd generate``: frames from a bundle, a prompt and actions."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from diagd.bundle.targets import file_target
from diagd.cli import terminal
from diagd.cli.options import Verb
from diagd.engines.engine import Float
from diagd.errors import UsageError, require
from diagd.play.opening import GameOptions, open_replay
from diagd.play.record import Played, is_record, replay
from diagd.progress import Progress
from diagd.runtime.generate import Made, generate
from diagd.runtime.options import GenerateOptions
from diagd.runtime.video import OUTPUTS, write_tokens, write_video

EXAMPLES = """examples:
  diagd-generate crafter-3m.diagd --prompt first.png --actions walk.jsonl --output walk.mp4
  diagd-generate crafter-3m.diagd --prompt first.png --actions walk.jsonl --output a.gif --decoder k=2,chained
  diagd-generate mineworld.diagd --prompt clip.mp4 --actions clip.jsonl --set prompt_frames=8 --output a.mp4
  diagd-generate wham.diagd --prompt episode.npz --start 20 --branches 3 --output dream.mp4
  diagd-generate wham.diagd --prompt episode.npz --actions model --frames 10 --output dream.npz
  diagd-generate cosmos.diagd --prompt clips/ --output made/
  diagd-generate crafter-3m.diagd --prompt played.ndjson --output played.mp4

An action file holds one JSON object a line. Where it has the name of the prompt (clip.mp4 and clip.jsonl), it
is of the same recording: what was done between the frames of the prompt is fed, what comes behind leads to
the frames that are made. Else each line leads to a frame to make. A folder of videos or episodes, or a .jsonl
of {"visual_input": file, "prompt": words, "actions": file}, is many prompts over one session: their files go
to the folder --output, and those that are there are left out. A folder of images is one prompt, with a line
for each in its actions.jsonl.

The prompt is as many pictures as the model's release takes; --set prompt_frames=8 --start 40 takes eight
from the fortieth on. With --actions model the model plays, for as many --frames: what it decodes as its
action at a frame leads to the next one. What the recording of the prompt says was done at its frames is
kept. With --set further=model it plays on behind the lines that are given. Its actions are written beside the
output, as NAME.jsonl; an output .npz is an episode as the release of WHAM writes it.

--decoder is the order of decoding, its words between spaces or commas: k=N, steps between the starts of two
rows (as many as columns, or ntp, is next-token prediction); and steps between the starts of two frames:
serial (a frame is finished before the next starts), chained (the next follows row by row: fewest passes) or
d=N; diagonal is the bundle's own. seeds=above, duplicate or prompt are other row seeds than previous_frame.
Or it is jacobi: exactly the tokens of next-token prediction, in few passes; jacobi,window=24 verifies so many
at once. Or draft: another bundle, precision or decoder (--set drafter=, drafter_precision=, drafter_decoder=)
drafts frames, and what scores below --set tau= is decoded by the bundle itself.

A record of diagd-play, as --prompt or --actions, brings its own prompt, actions, decoder and seed: it is
played again, and the first frame whose tokens differ is named.
"""


def run(options: GenerateOptions) -> None:
    """Generate, and say what it took."""
    console = terminal.console()
    files = (options.clip.actions, options.clip.prompt)
    record = next((file for file in files if file is not None and file.is_file() and is_record(file)), None)
    if record is not None:
        _replay(options, record, console)
        return
    for made in generate(options, Progress(console), encode_text):
        _report(console, made)


def _replay(options: GenerateOptions, record: Path, console: Console) -> None:
    """Write what was seen when a record was played, every frame checked against it."""
    file_target(options.output, OUTPUTS)
    game, lines = open_replay(options.bundle, record, GameOptions(session=options.session))
    if not (frames := sum(isinstance(line, Played) for _, line in lines)):
        game.close()
        raise UsageError(f"{record} has no frame: nothing was played; give one of a longer game")
    fps = options.fps or game.bundle.manifest.frames_per_second
    with game, Progress(console).count(record.name, frames) as advance:
        shown = (advance(1) or one for one in replay(game, lines))
        if options.output.suffix.lower() == ".npy":
            write_tokens(options.output, (one.frame.tokens for one in shown))
        else:
            pictures = (picture for one in shown for picture in one.pictures)
            write_video(options.output, pictures, fps, game.bundle.manifest.mark)
    console.print(f"{frames} frames, all equal to the record to the token: {options.output}")


def _report(console: Console, made: Made) -> None:
    if not made.frames:
        console.print(f"there already: {made.output}")
        return
    spent = made.timing
    times = (spent.engine, spent.host, made.decoding)
    engine, host, both = (f"{1e3 * seconds / spent.steps:.2f} ms" for seconds in times)
    # What the host saw of an engine that it runs ahead of is how long queueing took.
    passes = f"of {both}" if made.ahead else f"of {engine}, host {host} a pass"
    each = f"{spent.steps / made.frames:.3g} passes a frame"
    near = "" if made.psnr is None else f", PSNR {made.psnr:.2f} dB to the recording"
    console.print(
        f"{made.frames} frames in {made.seconds:.2f} s, {made.frames / made.seconds:.2f} frames/s: "
        f"{spent.steps} passes {passes}, {each}{near}: {made.output}"
    )
    if made.lines is not None:
        console.print(f"the model's actions: {made.lines}")
    if made.exact is not None:
        whole, worst = made.exact
        console.print(
            f"{whole:.2%} of the tokens are next-token prediction's with this seed, {worst:.2%} of the worst "
            "frame's, behind the same tokens"
        )
    if spent.refill_steps:
        console.print(
            f"the sliding window was fed again in {spent.refill_steps} further passes, "
            f"{spent.refill_seconds:.2f} s of the total; a larger --set roll slides less often"
        )


def encode_text(words: str, encoder: Path, length: int) -> Float:
    """Embeddings float32 [n, width] of words, by an encoder in a folder."""
    require("torch", extra="text", purpose="encode text with T5")
    from diagd.export.families import cosmos

    return cosmos.encode_text(words, encoder, length)


VERB = Verb(GenerateOptions, run, EXAMPLES)
