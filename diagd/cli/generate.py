"""``diagd generate``: frames from a bundle, a prompt and actions."""

from __future__ import annotations

from pathlib import Path

from diagd.cli import terminal
from diagd.cli.options import Verb
from diagd.engines.engine import Float
from diagd.errors import require
from diagd.progress import Progress
from diagd.runtime.generate import GenerateOptions, generate

EXAMPLES = """examples:
  diagd-generate crafter-3m.diagd --prompt first.png --actions walk.jsonl --output walk.mp4
  diagd-generate crafter-3m.diagd --prompt first.png --actions walk.jsonl --output a.gif --decoder k=2,chained
  diagd-generate mineworld.diagd --prompt tokens.npy --actions play.jsonl --output out.npy --set temperature=0

An action file holds one JSON object a line: the action that leads to each frame to be made.
--decoder is the order of decoding, its words between spaces or commas: k=N, steps between the starts of two
rows (as many as columns, or 'next token', is next-token prediction); and steps between the starts of two
frames: serial (a frame is finished before the next starts), chained (the next follows row by row: fewest
passes) or d=N. seeds=above, duplicate or prompt are other row seeds than previous_frame.
"""


def run(options: GenerateOptions) -> int:
    """Generate, and say what it took."""
    console = terminal.console()
    made = generate(options, Progress(console), _encode_text)
    engine, host, both = (
        f"{1e3 * spent / made.passes:.2f} ms" for spent in (made.engine, made.host, made.decoding)
    )
    # What the host saw of an engine that it runs ahead of is how long queueing took.
    passes = f"of {both}" if made.ahead else f"of {engine}, host {host} a pass"
    console.print(
        f"{made.frames} frames in {made.seconds:.2f} s, {made.frames / made.seconds:.2f} frames/s: "
        f"{made.passes} passes {passes}: {options.output}"
    )
    if made.refill_steps:
        console.print(
            f"the sliding window was fed again in {made.refill_steps} further passes, "
            f"{made.refill_seconds:.2f} s of the total; a larger --set roll slides less often"
        )
    return 0


def _encode_text(words: str, encoder: Path, length: int) -> Float:
    require("torch", extra="text", purpose="encode text with T5")
    from diagd.export.text_encoder import encode_text

    return encode_text(words, encoder, length)


VERB = Verb(GenerateOptions, run, EXAMPLES)
