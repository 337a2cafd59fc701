"""MineWorld (arXiv 2504.08388), the MC-AR model of the Diagonal Decoding paper: Minecraft, 14 x 24 tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

from diagd.bundle import actions
from diagd.bundle.actions import ActionCodec
from diagd.bundle.manifest import IdRange, SamplingRules
from diagd.bundle.transformer import TransformerConfig, linear_rotary
from diagd.export.families import LLAMA, Family, named_rules
from diagd.export.tokenizers.base import VQGAN_PARTS, VqganConfig
from diagd.schedule import StreamLayout

VISUAL_CODES = 8192
VOCABULARY = 8262
HEAD_SIZE = 64


_BUTTONS: Final = (
    *("use", "attack", "forward", "back", "left", "right", "jump", "sneak", "sprint", "drop"),
    *("swapHands", "pickItem", "inventory", "ESC"),
)
_HOTBAR: Final = tuple(f"hotbar.{number}" for number in range(1, 10))
_TOKENS: Final = {name: VISUAL_CODES + index for index, name in enumerate((*_BUTTONS, *_HOTBAR))}
_CAMERA_BINS: Final = 21
_CAMERA: Final = VISUAL_CODES + len(_TOKENS)
_BEGIN, _NONE, _END = (_CAMERA + 2 * _CAMERA_BINS + index for index in range(3))

_KEYS: Final = {
    "w": "forward",
    "s": "back",
    "a": "left",
    "d": "right",
    "space": "jump",
    "left.shift": "sneak",
    "left.control": "sprint",
    "q": "drop",
    "f": "swapHands",
    "e": "inventory",
    "escape": "ESC",
} | {name.removeprefix("hotbar."): name for name in _HOTBAR}


_OF_DIFFUSERS: Final = {
    ".resnets.": ".block.",
    ".downsamplers.0.": ".downsample.",
    ".upsamplers.0.": ".upsample.",
    ".mid_block.block.0.": ".mid.block_1.",
    ".mid_block.block.1.": ".mid.block_2.",
    ".conv_norm_out.": ".norm_out.",
    ".conv_shortcut.": ".nin_shortcut.",
}


@dataclass(frozen=True)
class MineworldVqgan(VqganConfig):
    """The image tokenizer, whose checkpoints have the names of diffusers' ``VQModel``."""

    height: int = 224
    width: int = 384
    channels: tuple[int, ...] = (128, 256, 256, 512, 768)
    attention_levels: tuple[int, ...] = ()
    middle_attention: bool = False
    latent_channels: int = 64
    code_width: int = 64
    codes: int = 8192

    released = 146_244_675

    def rename(self, name: str) -> str | None:
        """Parameter name of a key of vae.ckpt, or of the copy that MineWorld's transformers carry."""

        def level(match: re.Match[str]) -> str:
            number = int(match[2])  # diffusers counts levels of a decoder from the coarsest
            return f".{match[1]}.{len(self.channels) - 1 - number if match[1] == 'up' else number}."

        parameter = name.removeprefix("tokenizer.").removeprefix("model.")
        parameter = re.sub(r"\.(down|up)_blocks\.(\d+)\.", level, parameter)
        for its, ours in _OF_DIFFUSERS.items():
            parameter = parameter.replace(its, ours)
        return parameter if parameter.startswith(VQGAN_PARTS) else None


_300M: Final = TransformerConfig(
    layout=StreamLayout(rows=14, columns=24, after=11),
    context_frames=16,
    vocabulary=VOCABULARY,
    output_vocabulary=VOCABULARY,
    hidden=1024,
    feed_forward=4096,
    layers=20,
    heads=16,
    kv_heads=4,
    head_size=HEAD_SIZE,
    rotary=linear_rotary(HEAD_SIZE, 10_000.0),
)
_700M: Final = replace(_300M, hidden=2048, heads=32)
_1200M: Final = replace(_700M, feed_forward=8192)

SIZES: Final = {
    "mineworld-300m": _300M,
    "mineworld-700m": _700M,
    "mineworld-700m-32f": replace(_700M, context_frames=32),
    "mineworld-1200m": _1200M,
    "mineworld-1200m-32f": replace(_1200M, context_frames=32),
}


def build(name: str, checkpoint: str | None = None) -> Family:
    """One of the released sizes; their dimensions are not read from the checkpoint."""
    return family(name, SIZES[name])


def family(name: str, config: TransformerConfig) -> Family:
    """A MineWorld of any dimensions; small ones serve tests."""
    return Family(
        name=name,
        family="mineworld",
        transformer=config,
        rules=named_rules(config, LLAMA),
        prefixes=("transformer.",),
        ignored=(".rotary_emb.inv_freq",),  # a buffer, which earlier versions of the library saved
        sampling=SamplingRules(ranges=(IdRange(low=0, high=VISUAL_CODES),), top_p=0.8),
        order="k=1 serial",
        frames_per_second=6.0,
        licence="code MIT; the weights' licence was never stated",
        origin="microsoft/mineworld on the Hugging Face Hub, withdrawn in May 2025: bring your own file",
        actions=mineworld_actions(),
        tokenizer=MineworldVqgan(),
    )


def mineworld_actions() -> ActionCodec:
    """Codec of every released MineWorld size (vocabulary of 8262): ids, camera quantiser and raw VPT input.

    The encoder of the released code never tells swapHands, inventory and ESC, though they have ids.
    """
    return ActionCodec(
        slots=(
            actions.ConstantSlot(token=_BEGIN),
            _camera(0),
            _camera(1),
            actions.FirstPressedSlot(buttons=_buttons(*_HOTBAR), none=_NONE),
            _either("forward", "back"),
            _either("left", "right"),
            _either("sprint", "sneak"),
            _either("use", "attack"),
            _either("jump"),
            _either("drop", "pickItem"),
            actions.ConstantSlot(token=_END),
        ),
        ignored=("swapHands", "inventory", "ESC"),
        raw=actions.RawInput(
            keys={f"key.keyboard.{key}": button for key, button in _KEYS.items()},
            mouse_buttons=("attack", "use", "pickItem"),
            camera="camera",
            degrees_per_pixel=360 / 2400,
            whole_degrees=True,
            cancelling=(
                ("forward", "back"),
                ("left", "right"),
                ("jump", "sneak"),
                ("sprint", "sneak"),
                ("attack", "use"),
            ),
        ),
    )


def _buttons(*names: str) -> tuple[actions.Button, ...]:
    return tuple(actions.Button(name=name, token=_TOKENS[name]) for name in names)


def _either(*names: str) -> actions.Slot:
    return actions.OnlyPressedSlot(buttons=_buttons(*names), none=_NONE)


def _camera(component: int) -> actions.Slot:
    return actions.MuLawSlot(
        field="camera",
        component=component,
        limit=90.0,
        mu=11.4887,
        bins=_CAMERA_BINS,
        first=_CAMERA + component * _CAMERA_BINS,
    )
