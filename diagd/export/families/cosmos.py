"""Cosmos autoregressive world models (NVIDIA, arXiv 2501.03575): 5 latent frames of 40 x 64 tokens.

The video2world models also attend to a T5 text embedding, start the stream with a token of its own (the first
id behind the visual ones), and add sinusoids of frame, row and column before every layer, so their positions
are absolute.
"""

from __future__ import annotations

from dataclasses import dataclass

from diagd.bundle.manifest import DefaultSchedule, IdRange, SamplingRules
from diagd.bundle.rotary import grid_rotary
from diagd.bundle.transformer import TextShape, TransformerConfig
from diagd.export.families.family import Family, TensorRule
from diagd.export.tokenizers import cosmos_dv
from diagd.schedule import StreamLayout, chained_lag

ROWS, COLUMNS, FRAMES = 40, 64, 5
HEAD_SIZE = 128
VISUAL_CODES = 64_000
TEXT = TextShape(length=512, width=1024)
"""Positions of the T5 encoder's output, those of padding (vectors of zero) included."""

TOKENIZER = "hf://nvidia/Cosmos-Tokenize1-DV8x16x16-720p"


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


def build(name: str, checkpoint: str | None = None) -> Family:
    """One of the released sizes; their dimensions are not read from the checkpoint."""
    size = SIZES[name]
    config = TransformerConfig(
        layout=StreamLayout(ROWS, COLUMNS, prefix_tokens=(VISUAL_CODES,) * size.text),
        context_frames=FRAMES,
        vocabulary=VISUAL_CODES + 64 * size.text,
        output_vocabulary=VISUAL_CODES,
        hidden=size.hidden,
        feed_forward=14_336,
        layers=size.layers,
        heads=32,
        kv_heads=8,
        head_size=HEAD_SIZE,
        rotary=grid_rotary(HEAD_SIZE, 500_000.0, yarn_scale=size.yarn_scale, trained=(3, 40)),
        layer_embedding=size.text,
        qk_norm=True,
        text=TEXT if size.text else None,
    )
    return family(name, config, checkpoint or f"hf://{size.repository}/model.pt")


def family(
    name: str,
    config: TransformerConfig,
    checkpoint: str | None = None,
    tokenizer: cosmos_dv.CosmosDvConfig | None = None,
) -> Family:
    """A Cosmos model of any dimensions; small ones serve tests."""
    layout = config.layout
    return Family(
        name=name,
        family="cosmos",
        title=f"{config.context_frames} latent frames of {layout.rows} x {layout.columns} tokens, 8 pixel "
        "frames each; " + ("video and text to video" if config.text else "video continuation"),
        transformer=config,
        rules=cosmos_rules(config),
        prefixes=("model.", ""),
        ignored=("_extra_state",),
        sampling=SamplingRules(
            ranges=(IdRange(low=0, high=config.output_vocabulary),), top_p=0.7 if config.text else 0.8
        ),
        schedule=DefaultSchedule(k=1, d=chained_lag(layout.rows, 1)),
        frames_per_second=25.0,
        licence="code Apache-2.0; weights NVIDIA Open Model License",
        origin=f"{SIZES[name].repository} on the Hugging Face Hub" if name in SIZES else "a checkpoint",
        tokenizer=cosmos_dv.graphs(tokenizer or cosmos_dv.CosmosDvConfig()),
        default_checkpoint=checkpoint,
        default_tokenizer=TOKENIZER,
    )


def cosmos_rules(config: TransformerConfig) -> tuple[TensorRule, ...]:
    """Rules for the names of the released model.pt."""
    hidden = config.hidden
    rules = [
        TensorRule("embedding", (("tok_embeddings.weight", (config.vocabulary, hidden)),)),
        TensorRule("norm.weight", (("norm.weight", (hidden,)),)),
        TensorRule("head", (("output.weight", (config.output_vocabulary, hidden)),), transpose=True),
    ]
    for layer in range(config.layers):
        prefix = f"layers.{layer}."
        rules += _self_attention(config, prefix) + _feed_forward(config, prefix)
        if config.text:
            rules += _cross_attention(config, prefix, config.text.width)
    return tuple(rules)


def _self_attention(config: TransformerConfig, layer: str) -> list[TensorRule]:
    query, key = config.heads * config.head_size, config.kv_heads * config.head_size
    source = f"{layer}attention."
    fused = tuple(
        (f"{source}{name}.weight", (width, config.hidden))
        for name, width in (("wq", query), ("wk", key), ("wv", key))
    )
    return [
        _vector(f"{layer}attention_norm.weight", f"{layer}attention_norm.weight", config.hidden),
        TensorRule(f"{source}qkv", fused, transpose=True),
        TensorRule(f"{source}out", ((f"{source}wo.weight", (config.hidden, query)),), transpose=True),
        *_head_norms(config, source),
    ]


def _cross_attention(config: TransformerConfig, layer: str, width: int) -> list[TensorRule]:
    query, key = config.heads * config.head_size, config.kv_heads * config.head_size
    source = f"{layer}cross_attention."
    fused = tuple((f"{source}{name}.weight", (key, width)) for name in ("wk", "wv"))
    norm = f"{layer}cross_attention_norm.weight"
    return [
        _vector(norm, norm, config.hidden),
        TensorRule(f"{source}query", ((f"{source}wq.weight", (query, config.hidden)),), transpose=True),
        TensorRule(f"{source}key_value", fused, transpose=True),
        TensorRule(f"{source}out", ((f"{source}wo.weight", (config.hidden, query)),), transpose=True),
        *_head_norms(config, source),
    ]


def _head_norms(config: TransformerConfig, source: str) -> list[TensorRule]:
    names = (("query_norm", "q_norm"), ("key_norm", "k_norm"))
    return [
        _vector(f"{source}{ours}.weight", f"{source}{its}.weight", config.head_size) for ours, its in names
    ]


def _feed_forward(config: TransformerConfig, layer: str) -> list[TensorRule]:
    hidden, inner, source = config.hidden, config.feed_forward, f"{layer}feed_forward."
    gated = tuple((f"{source}{name}.weight", (inner, hidden)) for name in ("w1", "w3"))
    return [
        _vector(f"{layer}feed_forward_norm.weight", f"{layer}ffn_norm.weight", hidden),
        TensorRule(f"{source}gate_up", gated, transpose=True),
        TensorRule(f"{source}down", ((f"{source}w2.weight", (hidden, inner)),), transpose=True),
    ]


def _vector(target: str, source: str, width: int) -> TensorRule:
    return TensorRule(target, ((source, (width,)),))
