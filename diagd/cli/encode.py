"""``diagd encode``: a video to tokens."""

from __future__ import annotations

from diagd.cli import terminal
from diagd.cli.options import Verb
from diagd.progress import Progress
from diagd.runtime.video import EncodeOptions, encode

EXAMPLES = """examples:
  diagd encode crafter-3m.diagd walk.mp4 --output walk.npy
  diagd encode cosmos.diagd clip.mp4 --output clip.npy --frames 33 --set resize=true

`diagd-generate --prompt` and `diagd-calibrate --data` take the tokens, as does `diagd align --data` for
models without actions, and decoders of other makers start from them. PSNR tells what the tokenizer loses.
"""


def run(options: EncodeOptions) -> None:
    """Encode, and say what it loses."""
    console = terminal.console()
    done = encode(options, Progress(console))
    console.print(
        f"{done.pictures} pictures to {done.frames} token frames, PSNR {done.psnr:.2f} dB: {options.output}"
    )


VERB = Verb(EncodeOptions, run, EXAMPLES)
