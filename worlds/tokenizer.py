"""Fits a tokenizer to frames: their patches where these can be enumerated, else a network is trained."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from diagd.bundle.files import atomic_file
from diagd.errors import UsageError
from diagd.export.checkpoints import save_tensors
from diagd.export.families.world import TOKENIZER, CompactConfig, CompactGraphs, read_tokenizer
from diagd.export.tokenizers.base import TokenizerGraphs, loaded
from diagd.export.tokenizers.vqgan_network import codes_of_latents, scaled_images
from diagd.export.tokenizers.world_network import CompactDecoder, CompactEncoder
from diagd.runtime.arrays import read_arrays
from diagd.tuning.recordings import episode_paths, episodes, load_episode
from worlds.metrics import psnr, ssim
from worlds.options import TrainOptions
from worlds.progress import Checkpoint, Progress, Report, learning_rate, log

RATE, BATCH = 2e-3, 32
_SSIM_WEIGHT, _EDGE_WEIGHT = 0.2, 1.0
_WINDOW = 7
_MEMORY = 400 << 20
"""Bytes of the frames that are trained on, spread over all episodes."""

_JUDGED = 64


_SAMPLE, _PATCH_BATCH = 65_536, 4096

Tensors = Mapping[str, Tensor]
"""Of both pixel graphs, by name."""

Patches = Counter[bytes]
"""How often each distinct patch occurs, uint8 [p, p, 3] as bytes."""


@dataclass(frozen=True)
class FittedTokenizer:
    """A tokenizer; ``config`` is None for patches, frames may have ids 0 to ``used`` - 1."""

    config: CompactConfig | None
    tensors: Tensors
    used: int


@dataclass(frozen=True)
class Reconstruction:
    """Frames that were encoded and decoded, against themselves: PSNR (dB), SSIM, ids in use of how many."""

    psnr: float
    ssim: float
    used: int
    codes: int


def fit_tokenizer(options: TrainOptions, report: Report | None = None) -> FittedTokenizer:
    """The tokenizer in ``options.output``, fitted if it is not there; goes on where a training was stopped.

    Raises:
        UsageError: no episodes, frames of another size than whole cells, or a checkpoint of another recipe.
    """
    if options.tokenizer != "learned" and (fitted := _fit_patches(options)) is not None:
        return fitted
    config, path = CompactConfig.of_codes(options.codes, options.patch), options.output / TOKENIZER
    height, width = next(episodes(options.data)).frames.shape[1:3]
    pixels = CompactGraphs(height, width, config)
    if not path.exists():
        save_tensors(path, train_tokenizer(options, pixels, report))
    return FittedTokenizer(config, read_tokenizer(path, pixels), options.codes)


def _fit_patches(options: TrainOptions) -> FittedTokenizer | None:
    """The codebook of patches; None if there are too many and these may not be clustered."""
    path = options.output / "codebook.npz"
    if not path.exists():
        videos = (episode.frames for episode in episodes(options.data))
        exact = options.tokenizer == "auto"
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
    options: TrainOptions, graphs: CompactGraphs, report: Report | None = None
) -> dict[str, Tensor]:
    """Train, resuming from ``tokenizer.pt``; returns the tensors of both graphs in float16, by name.

    Deterministic given options and device.

    Raises:
        UsageError: no episodes, or a checkpoint of another recipe.
    """
    trainer, frames, started = _Trainer(options, graphs), training_frames(options.data), time.monotonic()
    recipe = {"config": asdict(graphs.sizes), "steps": options.tokenizer_steps, "seed": options.seed}
    parts = {"networks": trainer.networks, "optimiser": trainer.optimiser}
    checkpoint = Checkpoint(options.output / "tokenizer.pt", "tokenizer", recipe, parts)
    path, first = options.output / "tokenizer.jsonl", checkpoint.resumed(options.devices[0])
    for step in range(first, options.tokenizer_steps):
        random = np.random.default_rng((options.seed, step))
        pixels = torch.from_numpy(frames[random.integers(len(frames), size=BATCH)])
        loss = trainer.train(pixels.to(options.devices[0]), learning_rate(step + 1, options.tokenizer_steps))
        seconds = time.monotonic() - started
        log(path, Progress(step + 1, options.tokenizer_steps, loss, seconds, first, "tokenizer"), report)
        if (step + 1) % options.checkpoint_every == 0 or step + 1 == options.tokenizer_steps:
            checkpoint.write(step + 1)
    return {name: tensor.detach().cpu().half() for name, tensor in trainer.tensors().items()}


class _Trainer:
    """Networks and their optimiser."""

    def __init__(self, options: TrainOptions, graphs: CompactGraphs) -> None:
        self.levels = graphs.sizes.levels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.encoder, self.decoder = CompactEncoder(graphs), CompactDecoder(graphs)
        self.networks = nn.ModuleList([self.encoder, self.decoder]).to(options.devices[0])
        self.optimiser = torch.optim.AdamW(self.networks.parameters(), betas=(0.9, 0.95), weight_decay=0.01)

    def tensors(self) -> dict[str, Tensor]:
        return self.encoder.state_dict() | self.decoder.state_dict()

    def train(self, pixels: Tensor, rate: float) -> float:
        """One step on frames uint8 [B, H, W, 3]; returns the loss."""
        images = scaled_images(pixels, torch.zeros(()))
        with torch.autocast(images.device.type, torch.bfloat16):
            codes = codes_of_latents(self.encoder.latents(images), self.levels)
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


@overload
def fit_codebook(
    videos: Iterable[NDArray[np.uint8]], *, codes: int, side: int, seed: int = 0
) -> tuple[NDArray[np.uint8], int]: ...


@overload
def fit_codebook(
    videos: Iterable[NDArray[np.uint8]], *, codes: int, side: int, seed: int = 0, exact: bool
) -> tuple[NDArray[np.uint8], int] | None: ...


def fit_codebook(
    videos: Iterable[NDArray[np.uint8]], *, codes: int, side: int, seed: int = 0, exact: bool = False
) -> tuple[NDArray[np.uint8], int] | None:
    """Choose the codes for patches of ``videos``, each uint8 [T, H, W, 3].

    Returns:
        uint8 [codes, side, side, 3], most frequent first, and how many of them are in use; the rest repeat
        the first code, which as the lowest id always wins against them. None if they had to be ``exact`` and
        there are more patches than codes.

    Raises:
        UsageError: no frame at all, or frames that are not made of whole patches.
    """
    patches = _count(videos, side, np.random.default_rng(seed), codes if exact else None)
    if patches is None:
        return None
    if len(patches) > codes:
        patches = _cluster(patches, codes, seed)
    used = sorted(patches, key=lambda patch: (-patches[patch], patch))
    flat = np.frombuffer(b"".join(used + used[:1] * (codes - len(used))), np.uint8)
    return flat.reshape(codes, side, side, 3).copy(), len(used)


def cut_patches(frames: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Cut uint8 [T, H, W, 3] into uint8 [T * H/side * W/side, side * side * 3], in raster order.

    Raises:
        UsageError: the frame size is no multiple of ``side``.
    """
    count, height, width, _ = frames.shape
    if height % side or width % side:
        raise UsageError(
            f"frames of {height}x{width} pixels cannot be cut into {side}x{side} patches; resize them"
        )
    grid = frames.reshape(count, height // side, side, width // side, side, 3)
    return np.ascontiguousarray(grid.transpose(0, 1, 3, 2, 4, 5)).reshape(-1, side * side * 3)


def _count(
    videos: Iterable[NDArray[np.uint8]], side: int, random: np.random.Generator, most: int | None
) -> Patches | None:
    """Distinct patches; None beyond ``most`` of them, a random sample beyond ``_SAMPLE``."""
    patches: Patches = Counter()
    for frames in videos:
        patches.update(patch.tobytes() for patch in cut_patches(frames, side))
        if most is not None and len(patches) > most:
            return None
        if len(patches) > _SAMPLE:
            known = list(patches.items())
            patches = Counter(dict(known[n] for n in random.choice(len(known), _SAMPLE, replace=False)))
    if not patches:
        raise UsageError("no frames to fit a codebook to; the folder holds no episode")
    return patches


def _cluster(patches: Patches, codes: int, seed: int) -> Patches:
    """The centres of k-means, rounded to pixels, with the number of patches that each one stands for."""
    from sklearn.cluster import MiniBatchKMeans

    points = np.frombuffer(b"".join(patches), np.uint8).reshape(len(patches), -1).astype(np.float32)
    weights = np.fromiter(patches.values(), np.float64)
    fitted = MiniBatchKMeans(codes, random_state=seed, batch_size=_PATCH_BATCH, n_init=1)
    nearest = fitted.fit_predict(points, sample_weight=weights)
    centres = np.rint(fitted.cluster_centers_).clip(0, 255).astype(np.uint8)
    found: Patches = Counter()
    for centre, count in zip(centres, np.bincount(nearest, weights, codes).astype(int).tolist(), strict=True):
        found[centre.tobytes()] += count
    return +found  # without the centres that nothing is near to
