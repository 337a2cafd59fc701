"""Cosmos autoregressive world models (NVIDIA, arXiv 2501.03575): 5 latent frames of 40 x 64 tokens.

The video2world models also attend to a T5 text embedding, start the stream with a token of its own (the first
id behind the visual ones), and add sinusoids of frame, row and column before every layer, so their positions
are absolute.

The discrete video tokenizer (DV8x16x16) is eight-fold smaller in time after a first frame of its own,
sixteen-fold in space: a two-level Haar transform, a causal convolutional network, finite scalar
quantisation. Parameters carry the names of the released TorchScript archives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from diagd.bundle.manifest import ClipRules, IdRange, SamplingRules
from diagd.bundle.transformer import TextShape, TransformerConfig, grid_rotary
from diagd.engines.engine import Float
from diagd.errors import UsageError, require
from diagd.export.families import Family, Names, named_rules
from diagd.export.tokenizers.base import VqganSizes
from diagd.schedule import StreamLayout

HAAR_SIDE = 4
"""Pixels along each axis that one coefficient of the Haar transform covers."""

PIXELS = 16
"""Of a token, down and across."""

HEAD_SIZE = 128
VISUAL_CODES = 64_000

NAMES: Names = {
    "embedding": "tok_embeddings.weight",
    "norm.weight": "norm.weight",
    "head": "output.weight",
    "layers.*.attention_norm.weight": "layers.*.attention_norm.weight",
    "layers.*.attention.qkv": tuple(f"layers.*.attention.{name}.weight" for name in ("wq", "wk", "wv")),
    "layers.*.attention.out": "layers.*.attention.wo.weight",
    "layers.*.attention.query_norm.weight": "layers.*.attention.q_norm.weight",
    "layers.*.attention.key_norm.weight": "layers.*.attention.k_norm.weight",
    "layers.*.cross_attention_norm.weight": "layers.*.cross_attention_norm.weight",
    "layers.*.cross_attention.query": "layers.*.cross_attention.wq.weight",
    "layers.*.cross_attention.key_value": tuple(
        f"layers.*.cross_attention.{name}.weight" for name in ("wk", "wv")
    ),
    "layers.*.cross_attention.out": "layers.*.cross_attention.wo.weight",
    "layers.*.cross_attention.query_norm.weight": "layers.*.cross_attention.q_norm.weight",
    "layers.*.cross_attention.key_norm.weight": "layers.*.cross_attention.k_norm.weight",
    "layers.*.feed_forward_norm.weight": "layers.*.ffn_norm.weight",
    "layers.*.feed_forward.gate_up": tuple(f"layers.*.feed_forward.{name}.weight" for name in ("w1", "w3")),
    "layers.*.feed_forward.down": "layers.*.feed_forward.w2.weight",
}
"""Of the released model.pt, see ``named_rules``."""

SINGLE = (
    "the release warns that of prompts of one picture some 15 % (4B) and 7 % (5B) of clips fail; give a "
    "video of 9 pictures or more"
)


@dataclass(frozen=True)
class CosmosDvConfig(VqganSizes):
    """Sizes of the tokenizer; the defaults are the 720p release as the autoregressive models use it.

    The first level also halves the time. ``levels``: values that each quantised channel can take.
    """

    height: int = 640
    width: int = 1024
    channels: tuple[int, ...] = (256, 512, 512)
    latent_channels: int = 16
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)

    network = "cosmos_dv_network"
    temporal_factor = 8
    chunk_frames = 33
    cover = True
    finest = HAAR_SIDE
    released = 110_898_294

    @property
    def codes(self) -> int:
        """All combinations of levels."""
        return math.prod(self.levels)

    def rename(self, name: str) -> str | None:
        """Parameter name of a key of encoder.jit, decoder.jit or autoencoder.jit; None for buffers."""
        weights = name.endswith((".weight", ".bias"))
        known = name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))
        return name if weights and known else None


@dataclass(frozen=True)
class _Size:
    repository: str
    layers: int
    hidden: int
    yarn_scale: float
    text: bool


SIZES = {
    "cosmos-4b": _Size("nvidia/Cosmos-Predict1-4B", 16, 4096, 1.0, False),
    "cosmos-12b": _Size("nvidia/Cosmos-Predict1-12B", 40, 5120, 2.0, False),
    "cosmos-5b-video2world": _Size("nvidia/Cosmos-Predict1-5B-Video2World", 16, 4096, 1.0, True),
    "cosmos-13b-video2world": _Size("nvidia/Cosmos-Predict1-13B-Video2World", 40, 5120, 2.0, True),
}


def build(name: str, checkpoint: str | None = None, size: tuple[int, int] = (640, 1024)) -> Family:
    """One of the released models; their dimensions are not read from the checkpoint.

    The release post-trains at pictures of 384 x 640 and 640 x 848 too; UsageError where they are not whole.
    """
    model, (height, width) = SIZES[name], size
    if height % PIXELS or width % PIXELS or min(size) < PIXELS:
        raise UsageError(f"pictures of {height}x{width}: expected multiples of {PIXELS}, a token's pixels")
    config = TransformerConfig(
        layout=StreamLayout(height // PIXELS, width // PIXELS, prefix_tokens=(VISUAL_CODES,) * model.text),
        context_frames=5,
        vocabulary=VISUAL_CODES + 64 * model.text,
        output_vocabulary=VISUAL_CODES,
        hidden=model.hidden,
        feed_forward=14_336,
        layers=model.layers,
        heads=32,
        kv_heads=8,
        head_size=HEAD_SIZE,
        rotary=grid_rotary(HEAD_SIZE, 500_000.0, yarn_scale=model.yarn_scale, trained=(3, 40)),
        layer_embedding=model.text,
        qk_norm=True,
        # positions of the T5 encoder's output, those of padding (vectors of zero) included
        text=TextShape(length=512, width=1024) if model.text else None,
    )
    weights = checkpoint or f"hf://{model.repository}/model.pt"
    return family(name, config, weights, CosmosDvConfig(height=height, width=width))


def family(
    name: str,
    config: TransformerConfig,
    checkpoint: str | None = None,
    tokenizer: CosmosDvConfig | None = None,
) -> Family:
    """A Cosmos model of any dimensions; small ones serve tests."""
    return Family(
        name=name,
        family="cosmos",
        transformer=config,
        rules=named_rules(config, NAMES),
        prefixes=("model.", ""),
        ignored=("_extra_state",),
        sampling=SamplingRules(
            ranges=(IdRange(low=0, high=config.output_vocabulary),), top_p=0.7 if config.text else 0.8
        ),
        order="k=1 chained",
        frames_per_second=25.0,
        licence="code Apache-2.0; weights NVIDIA Open Model License",
        origin=f"{SIZES[name].repository} on the Hugging Face Hub" if name in SIZES else "a checkpoint",
        clips=ClipRules(frames=9, last=True, single=SINGLE),
        tokenizer=tokenizer or CosmosDvConfig(),
        default_checkpoint=checkpoint,
        default_tokenizer="hf://nvidia/Cosmos-Tokenize1-DV8x16x16-720p",
    )


def encode_text(words: str, encoder: Path, length: int) -> Float:
    """Last hidden states of a T5 encoder on this machine, as the models take them from google-t5/t5-11b.

    ``encoder`` is a folder in the layout of Hugging Face, with the tokenizer.

    Returns:
        float32 [n, width], one row a token, the end token included, at most ``length``.

    Raises:
        UsageError: the folder holds no T5 encoder.
        DependencyError: transformers is not installed.
    """
    import torch

    transformers = require("transformers", extra="text", purpose="encode text with T5")
    if not (encoder / "config.json").is_file():
        raise UsageError(f"{encoder} holds no T5 encoder: expected a folder with config.json and a tokenizer")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(encoder, local_files_only=True)
        model = transformers.T5EncoderModel.from_pretrained(encoder, local_files_only=True, dtype="auto")
    except (OSError, ValueError) as error:
        raise UsageError(f"{encoder} holds no T5 encoder: {error}") from error
    tokens = tokenizer(words, truncation=True, max_length=length, return_tensors="pt")
    with torch.inference_mode():
        states = model.eval()(tokens["input_ids"]).last_hidden_state[0]
    embeddings: Float = states.float().numpy()
    return embeddings
