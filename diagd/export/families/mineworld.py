"""MineWorld (arXiv 2504.08388), the MC-AR model of the Diagonal Decoding paper: Minecraft, 14 x 24 tokens."""

from __future__ import annotations

from dataclasses import dataclass

from diagd.bundle.manifest import DefaultSchedule, IdRange, SamplingRules
from diagd.bundle.rotary import linear_rotary
from diagd.bundle.transformer import TransformerConfig
from diagd.export.families.family import Family, llama_rules
from diagd.export.families.mineworld_actions import mineworld_actions
from diagd.export.tokenizers import vqgan
from diagd.schedule import StreamLayout

LAYOUT = StreamLayout(rows=14, columns=24, after=11)
VISUAL_CODES = 8192
VOCABULARY = 8262
HEAD_SIZE = 64


@dataclass(frozen=True)
class _Size:
    hidden: int
    feed_forward: int
    heads: int
    frames: int


SIZES = {
    "mineworld-300m": _Size(1024, 4096, 16, 16),
    "mineworld-700m": _Size(2048, 4096, 32, 16),
    "mineworld-700m-32f": _Size(2048, 4096, 32, 32),
    "mineworld-1200m": _Size(2048, 8192, 32, 16),
    "mineworld-1200m-32f": _Size(2048, 8192, 32, 32),
}


def build(name: str, checkpoint: str | None = None) -> Family:
    """One of the released sizes; their dimensions are not read from the checkpoint."""
    del checkpoint
    size = SIZES[name]
    config = TransformerConfig(
        layout=LAYOUT,
        context_frames=size.frames,
        vocabulary=VOCABULARY,
        output_vocabulary=VOCABULARY,
        hidden=size.hidden,
        feed_forward=size.feed_forward,
        layers=20,
        heads=size.heads,
        kv_heads=4,
        head_size=HEAD_SIZE,
        rotary=linear_rotary(HEAD_SIZE, 10_000.0),
    )
    return family(name, config)


def family(name: str, config: TransformerConfig) -> Family:
    """A MineWorld of any dimensions; small ones serve tests."""
    return Family(
        name=name,
        family="mineworld",
        title=f"Minecraft, {config.context_frames} frames of 14 x 24 tokens, 224 x 384 pixels",
        transformer=config,
        rules=llama_rules(config),
        prefixes=("transformer.",),
        sampling=SamplingRules(ranges=(IdRange(low=0, high=VISUAL_CODES),), top_p=0.8),
        schedule=DefaultSchedule(k=1),
        frames_per_second=6.0,
        licence="code MIT; the weights' licence was never stated",
        origin="microsoft/mineworld on the Hugging Face Hub, withdrawn in May 2025: bring your own file",
        actions=mineworld_actions(),
        tokenizer=vqgan.mineworld_graphs(),
    )
