"""Fits a tokenizer to frames: their patches where these can be enumerated, else a network is trained."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from diagd.bundle.files import atomic_file
from diagd.errors import UsageError, unknown
from diagd.export.families.world import TOKENIZER, CompactConfig, graphs, read_tokenizer
from diagd.export.tokenizers.base import TokenizerGraphs, loaded
from diagd.export.tokenizers.blocks import codes_of_latents, scaled_images
from diagd.export.tokenizers.compact_network import Decoder, Encoder
from diagd.runtime.arrays import read_arrays
from diagd.tuning.recordings import episode_paths, episodes, load_episode
from worlds.codebook import fit_codebook
from worlds.folder import save_tokenizer
from worlds.metrics import psnr, ssim
from worlds.progress import Checkpoint, Progress, Report, learning_rate, log

RATE, BATCH = 2e-3, 32
_SSIM_WEIGHT, _EDGE_WEIGHT = 0.2, 1.0
_WINDOW = 7
_MEMORY = 400 << 20
"""Bytes of the frames that are trained on, spread over all episodes."""

_JUDGED = 64


KINDS = ("auto", "patches", "learned")
"""Patches if they can be enumerated; patches, by k-means if need be; a trained network."""

Tensors = Mapping[str, Tensor]
"""Of both pixel graphs, by name."""


@dataclass(frozen=True)
class TokenizerOptions:
    """How a tokenizer is fitted.

    Attributes:
        data: folder of episodes.
        output: folder of the tokenizer, of its checkpoint and log.
        kind: name in `KINDS`.
        codes: number of ids.
        patch: pixels along a side of a cell.
        steps: optimiser steps of a network.
        seed: of initial weights and batches.
        device: of PyTorch.
        checkpoint_every: steps between checkpoints.
    """

    data: Path
    output: Path
    kind: str = "auto"
    codes: int = 512
    patch: int = 8
    steps: int = 3000
    seed: int = 0
    device: str = "cpu"
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("tokenizer", self.kind, KINDS)


@dataclass(frozen=True)
class FittedTokenizer:
    """A tokenizer.

    Attributes:
        config: sizes of the network; None for patches.
        tensors: of both pixel graphs.
        used: ids that frames may have, from 0 on.
    """

    config: CompactConfig | None
    tensors: Tensors
    used: int


@dataclass(frozen=True)
class Reconstruction:
    """Frames that were encoded and decoded, against themselves.

    Attributes:
        psnr, ssim: means over frames; dB and at most 1.
        used, codes: ids that occur, of how many.
    """

    psnr: float
    ssim: float
    used: int
    codes: int


def fit_tokenizer(options: TokenizerOptions, report: Report | None = None) -> FittedTokenizer:
    """The tokenizer in ``options.output``, fitted if it is not there; goes on where a training was stopped.

    Raises:
        UsageError: no episodes, frames of another size than whole cells, or a checkpoint of another recipe.
    """
    if options.kind != "learned" and (fitted := _fit_patches(options)) is not None:
        return fitted
    config, path = CompactConfig.of_codes(options.codes, options.patch), options.output / TOKENIZER
    if not path.exists():
        save_tokenizer(path, train_tokenizer(options, config, report))
    height, width = next(episodes(options.data)).frames.shape[1:3]
    return FittedTokenizer(config, read_tokenizer(path, graphs(config, height, width)), options.codes)


def _fit_patches(options: TokenizerOptions) -> FittedTokenizer | None:
    """The codebook of patches; None if there are too many and these may not be clustered."""
    path = options.output / "codebook.npz"
    if not path.exists():
        videos = (episode.frames for episode in episodes(options.data))
        exact = options.kind == "auto"
        fitted = fit_codebook(videos, codes=options.codes, side=options.patch, seed=options.seed, exact=exact)
        if fitted is None:
            return None
        with atomic_file(path) as partial:
            np.savez(partial, codebook=fitted[0], used=fitted[1])
    found = read_arrays(path, ("codebook", "used"), "codebook")
    shape = (options.codes, options.patch, options.patch, 3)
    if found.keys() != {"codebook", "used"} or found["codebook"].shape != shape or found["used"].size != 1:
        raise UsageError(f"{path} holds no {options.codes} codes of this recipe; give another output folder")
    codebook = torch.from_numpy(found["codebook"].astype(np.uint8))
    return FittedTokenizer(None, {"codebook": codebook}, int(found["used"]))


def train_tokenizer(
    options: TokenizerOptions, config: CompactConfig, report: Report | None = None
) -> dict[str, Tensor]:
    """Train, resuming from ``tokenizer.pt``; returns the tensors of both graphs in float16, by name.

    Deterministic given options and device.

    Raises:
        UsageError: no episodes, or a checkpoint of another recipe.
    """
    trainer, frames, started = _Trainer(options, config), training_frames(options.data), time.monotonic()
    recipe = {"config": asdict(config), "steps": options.steps, "seed": options.seed}
    parts = {"networks": trainer.networks, "optimiser": trainer.optimiser}
    checkpoint = Checkpoint(options.output / "tokenizer.pt", "tokenizer", recipe, parts)
    path, first = options.output / "tokenizer.jsonl", checkpoint.resumed(options.device)
    for step in range(first, options.steps):
        random = np.random.default_rng((options.seed, step))
        pixels = torch.from_numpy(frames[random.integers(len(frames), size=BATCH)])
        loss = trainer.train(pixels.to(options.device), learning_rate(step + 1, options.steps))
        seconds = time.monotonic() - started
        log(path, Progress(step + 1, options.steps, loss, seconds, first, "tokenizer"), report)
        if (step + 1) % options.checkpoint_every == 0 or step + 1 == options.steps:
            checkpoint.write(step + 1)
    return {name: tensor.detach().cpu().half() for name, tensor in trainer.tensors().items()}


class _Trainer:
    """Networks and their optimiser."""

    def __init__(self, options: TokenizerOptions, config: CompactConfig) -> None:
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.networks = nn.ModuleList([self.encoder, self.decoder]).to(options.device)
        self.optimiser = torch.optim.AdamW(self.networks.parameters(), betas=(0.9, 0.95), weight_decay=0.01)

    def tensors(self) -> dict[str, Tensor]:
        return self.encoder.state_dict() | self.decoder.state_dict()

    def train(self, pixels: Tensor, rate: float) -> float:
        """One step on frames uint8 [B, H, W, 3]; returns the loss."""
        images = scaled_images(pixels, torch.zeros(()))
        with torch.autocast(images.device.type, torch.bfloat16):
            codes = codes_of_latents(self.encoder.latents(images), self.config.levels)
            drawn = self.decoder.images(codes)
        loss = reconstruction_loss(drawn.float(), images)
        loss.backward()
        for group in self.optimiser.param_groups:
            group["lr"] = RATE * rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return loss.item()


def reconstruction_loss(drawn: Tensor, images: Tensor) -> Tensor:
    """Mean absolute difference of pixels and of their gradients, and 1 - SSIM; images ``[B, 3, H, W]``.

    The plain difference alone is least where textures are averaged; edges and local contrast keep them.
    """
    edges = sum((drawn.diff(dim=axis) - images.diff(dim=axis)).abs().mean() for axis in (2, 3))
    pixels = (drawn - images).abs().mean()
    return pixels + _EDGE_WEIGHT * edges + _SSIM_WEIGHT * (1 - _similarity(drawn, images))


def _similarity(a: Tensor, b: Tensor) -> Tensor:
    """SSIM (Wang et al. 2004, eq. 13) over square windows, of images of range 2."""

    def mean(x: Tensor) -> Tensor:
        return functional.avg_pool2d(x, _WINDOW, stride=2)

    ma, mb = mean(a), mean(b)
    va, vb, both = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    small, smaller = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    means = (2 * ma * mb + small) / (ma * ma + mb * mb + small)
    return (means * (2 * both + smaller) / (va + vb + smaller)).mean()


def training_frames(data: Path) -> NDArray[np.uint8]:
    """Frames uint8 [N, H, W, 3] of all episodes but the last, evenly spread, up to `_MEMORY`."""
    paths = episode_paths(data)
    paths, parts = paths[:-1] or paths, []
    for path in paths:
        frames = load_episode(path).frames
        share = max(1, _MEMORY // len(paths) // frames[0].nbytes)
        parts.append(frames[:: -(-len(frames) // share)])
    return np.concatenate(parts)


def reconstruct(pixel_graphs: TokenizerGraphs, tensors: Tensors, data: Path) -> Reconstruction:
    """Judge a tokenizer by frames of the last episode, which no network was trained on."""
    frames = load_episode(episode_paths(data)[-1]).frames
    pixels = torch.from_numpy(frames[:: -(-len(frames) // _JUDGED)])
    encoder = loaded(pixel_graphs.build("Encoder"), tensors)
    decoder = loaded(pixel_graphs.build("Decoder"), tensors)
    with torch.inference_mode():
        tokens = encoder(pixels)
        drawn = decoder(tokens).numpy()
    truth = pixels.numpy()
    return Reconstruction(
        psnr=float(psnr(drawn, truth).mean()),
        ssim=float(ssim(drawn, truth).mean()),
        used=len(tokens.unique()),
        codes=pixel_graphs.codes,
    )
