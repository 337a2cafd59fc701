"""What is aligned, its weights and its windows: of a bundle, the folder of a world, or a checkpoint."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from diagd.bundle import PROMPTS_NAME, Bundle, Manifest, atomic_bundle, put_prompts, seal
from diagd.bundle.manifest import MANIFEST_NAME, Provenance
from diagd.bundle.targets import bundle_target, check_apart, file_target, folder_target
from diagd.bundle.transformer import TransformerConfig
from diagd.engines.onnxruntime_session import CpuOptions
from diagd.errors import UsageError
from diagd.export.checkpoints import Checkpoint, check, save_tensors
from diagd.export.exporter import open_sources
from diagd.export.families import Family, find
from diagd.export.families.world import DESCRIPTION, WEIGHTS, load_tokenizer
from diagd.export.onnx_file import read_onnx
from diagd.export.transformer import Transformer
from diagd.export.weights import StoredWeights
from diagd.progress import is_first
from diagd.runtime.actions import encode
from diagd.runtime.arrays import read_ids
from diagd.runtime.clip import CLIPS, Clip, read_recording
from diagd.runtime.pictures import files_in
from diagd.runtime.pixels import PixelCodec
from diagd.schedule import StreamLayout
from diagd.tuning.align import Report, Validation, align
from diagd.tuning.options import AlignOptions
from diagd.tuning.recordings import FrameEncoder, cached_tokens
from diagd.version import __version__

_PREFIX = "transformer."


def read_model(bundle: Bundle) -> Transformer:
    """The transformer of a bundle in float32.

    Raises:
        BundleError, UsageError: its weights are not of the transformer that its manifest describes.
    """
    stored, model, manifest = StoredWeights(bundle), Transformer(bundle.manifest.transformer), bundle.manifest
    files = {graph.file for graph in manifest.graphs} | ({manifest.text.graph} if manifest.text else set())
    named = {tensor.name for file in files for tensor in read_onnx(bundle.file(file)).initializers}
    for name in model.state_dict():
        if _PREFIX + name not in named:
            raise UsageError(
                f"{bundle.path}: its graphs have no weight '{name}' of their own: they were exported before "
                "weights that are equal were kept apart; export the bundle again"
            )
    arrays = {name: np.array(stored[_PREFIX + name], np.float32) for name in model.state_dict()}
    model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    return model


def write_model(bundle: Bundle, model: Transformer, output: Path, manifest: Manifest) -> Path:
    """Write the bundle anew with the weights of ``model`` and ``manifest``; returns ``output``."""
    with atomic_bundle(output) as directory:
        for name in bundle.manifest.named_files:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.file(name), directory / name)
        stored = StoredWeights(Bundle(directory, bundle.manifest))
        for name, tensor in model.state_dict().items():
            stored.replace(_PREFIX + name, tensor.detach().cpu().numpy())
        seal(directory, manifest)
        put_prompts(bundle.file(PROMPTS_NAME), directory, output)
    return output


def tuned_manifest(bundle: Bundle, tuned: str, **changed: object) -> Manifest:
    """The manifest of weights that were fine-tuned, as ``tuned`` says, with other fields ``changed``."""
    source = bundle.manifest.provenance.source
    provenance = Provenance(source=source, tuned=tuned, diagd_version=__version__)
    return bundle.manifest.model_copy(update={"provenance": provenance, **changed})


def aligned_manifest(bundle: Bundle, options: AlignOptions) -> Manifest:
    """The manifest of the new weights: where they come from, and the schedule most of them were made for."""
    diagonal = [pair for pair in options.shares if pair[1].k < bundle.manifest.layout.columns]
    _, schedule = max(diagonal or options.shares, key=itemgetter(0))
    shares = ", ".join(f"{each.name} {share:.2g}" for share, each in options.shares)
    tuned = f"aligned for {options.steps} steps to {shares}"
    return tuned_manifest(bundle, tuned, order=schedule.name, decoder="order")


def write_checkpoint(family: Family, model: Transformer, output: Path) -> Path:
    """Write the .safetensors that ``diagd export --checkpoint`` reads: float16, under the released names."""
    state = {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}
    released: dict[str, NDArray[np.generic]] = {}
    for rule in family.rules:
        released |= rule.release(state[rule.target].astype(np.float16))
    prefix = family.prefixes[0]
    named = {prefix + name: torch.from_numpy(np.ascontiguousarray(one)) for name, one in released.items()}
    save_tensors(output, named)
    return output


def load_transformer(family: Family, source: Checkpoint) -> Transformer:
    """The family's transformer in float32, with the weights of a checkpoint.

    Raises:
        CheckpointError: it does not fit the model.
    """
    check(source, family.expected)
    state = {
        name: torch.from_numpy(np.concatenate([np.atleast_1d(chunk) for chunk in weight.chunks()]))
        for name, weight in family.weights(source).items()
    }
    model = Transformer(family.transformer)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model


@dataclass(frozen=True)
class Source:
    """What is aligned: a bundle, or the checkpoint of a family.

    The bundle ``encoder`` makes tokens of clips, by default the one that is aligned; with ``resize`` pictures
    of another size are scaled.
    """

    path: str
    what: Bundle | Family
    encoder: Path | None = None
    resize: bool = False

    @classmethod
    def open(cls, path: str, model: str | None) -> Source:
        """Find out what a path is; UsageError: it is neither a bundle nor a world, and no model is named."""
        if (Path(path) / MANIFEST_NAME).exists():
            if model:
                raise UsageError(f"--model {model}: a bundle says itself what it holds; leave --model out")
            return cls(path, Bundle.open(path))
        if not model and not (Path(path) / DESCRIPTION).exists():
            raise UsageError(
                f"{path} is neither a bundle nor the folder of a world; name the --model of a checkpoint: "
                "`diagd models` lists them"
            )
        return cls(path, find(model or "world", path))

    @property
    def config(self) -> TransformerConfig:
        """Of the transformer."""
        return self.what.manifest.transformer if isinstance(self.what, Bundle) else self.what.transformer

    @property
    def _tokenizer(self) -> Path | None:
        """Of a world: the file of its tokenizer."""
        file = None if isinstance(self.what, Bundle) else self.what.default_tokenizer
        return None if file is None else Path(file)

    def check_output(self, output: Path, read: Mapping[str, Path | None]) -> None:
        """Refuse an output that would take something away, the weights and files that are read included."""
        if isinstance(self.what, Bundle):
            place = bundle_target(output)
        elif self._tokenizer is None or output.suffix:
            place = file_target(output, (".safetensors",))
        else:
            place = folder_target(output, {"config.json": b'"patch"'}, "a trained world")
        if str(place) == str(Path(self.path).resolve()):
            raise UsageError(f"--output {output} is what is read; give another place")
        check_apart(place, read)

    def windows(self, data: Path, frames: int) -> NDArray[np.int64]:
        """Windows int64 [N, tokens of ``frames`` frames] of a recording, clips, or a .npy token stream.

        Raises:
            UsageError: the data cannot be read, or is no token stream and nothing encodes it.
        """
        if data.suffix.lower() == ".npy":
            return read_windows(data, self.config, frames)
        encoder = self._encoder()
        if encoder is None:
            return self._clip_windows(data, frames)
        recording = cached_tokens(data, encoder)
        if (highest := recording.streams.max()) >= self.config.vocabulary:
            raise UsageError(
                f"{data} has an action {highest - encoder.codes}; {self.path} knows "
                f"{self.config.vocabulary - encoder.codes}, from 0 on"
            )
        return recording.windows(recording.window_starts(frames)[:: max(1, frames // 2)], frames)

    def _clip_windows(self, data: Path, frames: int) -> NDArray[np.int64]:
        bundle = self.what if self.encoder is None else Bundle.open(self.encoder)
        if not isinstance(bundle, Bundle):
            raise UsageError(
                f"--data {data}: {self.path} encodes no pictures; give a .npy token stream, or the bundle of "
                "the model by --set encoder="
            )
        if bundle.manifest.layout != self.config.layout:
            raise UsageError(f"--set encoder={bundle.path}: its frames are not those of {self.path}")
        pixels = PixelCodec(bundle, CpuOptions())
        return read_clips(data, bundle.manifest, pixels, frames, resize=self.resize)

    def _encoder(self) -> FrameEncoder | None:
        if isinstance(self.what, Bundle):
            is_world = self.what.manifest.family == "world"
            return FrameEncoder.of_bundle(self.what, CpuOptions()) if is_world else None
        return FrameEncoder.of_graphs(*load_tokenizer(self._tokenizer.parent)) if self._tokenizer else None

    def align(
        self,
        streams: NDArray[np.int64],
        options: AlignOptions,
        output: Path,
        report: Report | None = None,
        text: NDArray[np.float32] | None = None,
        valid: Validation | None = None,
    ) -> Path:
        """Fine-tune, and write what is of the source's own kind; see ``diagd.tuning.align``.

        Graphs of other precisions than that of the export hold the old weights: they are left out.

        Raises:
            UsageError: the output would take something away, or the windows or text do not fit the model.
            BundleError, CheckpointError: the weights are not of the model.
        """
        self.check_output(output, {})
        what, given = self.what, set[str]()
        if isinstance(what, Bundle):
            what = what.at_precision()
            model = read_model(what)
        else:
            alone = replace(what, tokenizer=None)
            model = load_transformer(what, open_sources(alone, self.path, None).transformer)
            given = made_up(what)
        align(model, streams, options, report, text=text, frozen=given, valid=valid)
        if not is_first():
            return output
        if isinstance(what, Bundle):
            return write_model(what, model, output, aligned_manifest(what, options))
        if self._tokenizer is None or output.suffix:
            return write_checkpoint(what, model, output)
        write_checkpoint(what, model, output / WEIGHTS)
        for part in (self._tokenizer, self._tokenizer.with_name(DESCRIPTION)):
            shutil.copyfile(part, output / part.name)
        if what.prompts is not None:
            put_prompts(what.prompts, output, output)
        return output


def made_up(family: Family) -> set[str]:
    """Parameters that no checkpoint of the family can hold, so that they must stay as they are."""
    return {rule.target for rule in family.rules if not rule.sources}


def read_clips(
    folder: Path, manifest: Manifest, pixels: PixelCodec, frames: int, *, resize: bool = False
) -> NDArray[np.int64]:
    """Windows int64 [N, tokens of ``frames`` frames] of all clips of a folder, half a window apart.

    They are videos, each with the actions of its name in a .jsonl where the model takes some, or episodes.

    Raises:
        UsageError: a clip cannot be read, or none is as long as a window.
    """
    windows = []
    for path in files_in(folder, CLIPS):
        clip = read_recording(path, manifest, pixels, resize=resize)
        if len(clip.tokens) >= frames:
            windows.append(cut(stream_of(clip, manifest), manifest.layout, frames))
    if not windows:
        raise UsageError(f"{folder} has no clip of {frames} frames; give longer ones, or lower --set frames")
    return np.concatenate(windows)


def stream_of(clip: Clip, manifest: Manifest) -> NDArray[np.int64]:
    """The tokens int64 [T] of a clip in the order of the stream, without the prefix.

    Behind the last frame, where an action would stand that nobody knows, is the no-op: nothing follows it.
    """
    cells = clip.tokens.reshape(len(clip.tokens), -1).astype(np.int64)
    layout = manifest.layout
    if manifest.actions is None or clip.led is None:
        return cells.reshape(-1)
    led = np.concatenate([clip.led, encode(manifest.actions, {})[None]]).astype(np.int64)
    before, after = led[:-1, layout.gap - layout.before :], led[1:, : layout.after]
    return np.concatenate([before, cells, after], axis=1).reshape(-1)


def read_windows(path: Path, config: TransformerConfig, frames: int) -> NDArray[np.int64]:
    """Windows of a .npy token stream, int64 [N, tokens of ``frames`` frames], half a window apart.

    The file is int [T] or [T, frame_length]: the stream of one video, known tokens included, from a frame on,
    without the prefix.

    Raises:
        UsageError: the file is no such stream, or is shorter than a window.
    """
    layout, ids = config.layout, read_ids(path)
    if math.prod(ids.shape[1:]) not in (1, layout.frame_length):
        raise UsageError(
            f"{path} has shape {list(ids.shape)}; expected a stream, [tokens] or [frames, "
            f"{layout.frame_length}]: of each frame the {layout.gap} known tokens, its action, and the "
            f"{layout.cells} cells"
        )
    stream = ids.reshape(-1).astype(np.int64)
    length = frames * layout.frame_length
    if len(stream) < length or stream.min() < 0 or stream.max() >= config.vocabulary:
        raise UsageError(
            f"{path} holds {len(stream)} tokens in {stream.min(initial=0)}..{stream.max(initial=0)}; "
            f"expected {length} or more ({frames} frames of {layout.frame_length}) "
            f"in 0..{config.vocabulary - 1}"
        )
    return cut(stream, layout, frames)


def cut(stream: NDArray[np.int64], layout: StreamLayout, frames: int) -> NDArray[np.int64]:
    """Windows int64 [N, tokens of ``frames`` frames] of the stream [T] of one video, half a window apart."""
    length = frames * layout.frame_length
    step = max(1, frames // 2) * layout.frame_length
    starts = range(0, len(stream) - length + 1, step)
    windows = np.stack([stream[start : start + length] for start in starts])
    prefix = np.tile(np.asarray(layout.prefix_tokens, np.int64), (len(windows), 1))
    return np.concatenate([prefix, windows], axis=1)
