"""Alignment of a bundle: its weights are fine-tuned and written back; its graphs stay as they are."""

from __future__ import annotations

import math
import shutil
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from diagd.bundle import Bundle, Manifest, atomic_bundle, seal
from diagd.bundle.manifest import Provenance
from diagd.bundle.targets import bundle_target
from diagd.errors import BundleError, UsageError
from diagd.export.transformer import Transformer
from diagd.progress import is_first
from diagd.tuning.align import Report, Validation, align
from diagd.tuning.options import AlignOptions
from diagd.version import __version__

if TYPE_CHECKING:
    import onnx

_PREFIX = "transformer."


def align_bundle(
    bundle: Bundle,
    streams: NDArray[np.int64],
    options: AlignOptions,
    output: Path,
    report: Report | None = None,
    *,
    text: NDArray[np.float32] | None = None,
    valid: Validation | None = None,
) -> Path:
    """Fine-tune the weights of a bundle.

    Args:
        bundle: graphs of precisions other than that of its export hold the old weights and are left out.
        streams: int64 [N, tokens], windows of known videos.
        options: schedules and training settings.
        output: directory of the new bundle, which is not that of the old one.
        report: told about every step.
        text: see ``align``.
        valid: see ``align``.

    Raises:
        UsageError: the bundle would be written over.
        BundleError: its graphs are not of the transformer that its manifest describes.
    """
    if output.exists() and output.samefile(bundle.path):
        raise UsageError(f"--output {output} is the bundle that is read; give another place")
    bundle_target(output)
    base = bundle.at_precision()
    model = align(read_model(base), streams, options, report, text=text, valid=valid)
    if not is_first():
        return output
    return write_model(base, model, output, _aligned(base, options))


def read_model(bundle: Bundle) -> Transformer:
    """The transformer of a bundle in float32.

    Raises:
        BundleError, UsageError: its graphs are not of the transformer that its manifest describes.
    """
    return _read(_graphs(bundle), bundle)


def write_model(bundle: Bundle, model: Transformer, output: Path, manifest: Manifest) -> Path:
    """Write the bundle anew with the weights of ``model`` and ``manifest``; returns ``output``."""
    state = {_PREFIX + name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    with atomic_bundle(output) as directory:
        for name in _kept_files(bundle):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.file(name), directory / name)
        for graph in _graphs(bundle):
            _write(graph, directory, state)
        seal(directory, manifest)
    return output


def tuned_manifest(bundle: Bundle, tuned: str, **changed: object) -> Manifest:
    """The manifest of weights that were fine-tuned, as ``tuned`` says, with other fields ``changed``."""
    source = bundle.manifest.provenance.source
    provenance = Provenance(source=source, tuned=tuned, diagd_version=__version__)
    return bundle.manifest.model_copy(update={"provenance": provenance, **changed})


def _aligned(bundle: Bundle, options: AlignOptions) -> Manifest:
    """The manifest of the new weights: where they come from, and the schedule most of them were made for."""
    diagonal = [pair for pair in options.shares if pair[1].k < bundle.manifest.layout.columns]
    _, schedule = max(diagonal or options.shares, key=itemgetter(0))
    shares = ", ".join(f"{each.name} {share:.2g}" for share, each in options.shares)
    tuned = f"aligned for {options.steps} steps to {shares}"
    return tuned_manifest(bundle, tuned, order=schedule.name, decoder="order")


def _graphs(bundle: Bundle) -> list[onnx.ModelProto]:
    import onnx

    return [onnx.load(bundle.file(name), load_external_data=False) for name in _step_and_text(bundle)]


def _step_and_text(bundle: Bundle) -> list[str]:
    names = list(dict.fromkeys(graph.file for graph in bundle.manifest.graphs))
    return [*names, bundle.manifest.text.graph] if bundle.manifest.text else names


def _kept_files(bundle: Bundle) -> list[str]:
    manifest, tokenizer = bundle.manifest, bundle.manifest.tokenizer
    files = {*_step_and_text(bundle), *(name for graph in manifest.graphs for name in graph.weights.files)}
    if manifest.text:
        files.update(manifest.text.weight_files)
    if tokenizer:
        files.update((tokenizer.encoder, tokenizer.decoder, *tokenizer.weight_files))
    return sorted(files)


def _read(graphs: list[onnx.ModelProto], bundle: Bundle) -> Transformer:
    found = {
        tensor.name: _values(tensor, bundle)
        for graph in graphs
        for tensor in graph.graph.initializer
        if tensor.name.startswith(_PREFIX)
    }
    model = Transformer(bundle.manifest.transformer)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in wanted.items():
        if _PREFIX + name not in found:
            raise UsageError(
                f"{bundle.path}: its graphs have no weight '{name}' of their own (small weights that were "
                "equal when it was exported are merged); align the checkpoint instead"
            )
        if found[_PREFIX + name].shape != shape:
            raise BundleError(
                f"{bundle.path}: weight '{name}' is {found[_PREFIX + name].shape}, its manifest describes "
                f"{shape}; export the bundle again"
            )
    arrays = {name: np.array(found[_PREFIX + name], np.float32) for name in wanted}
    model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    return model


def _values(tensor: onnx.TensorProto, bundle: Bundle) -> NDArray[np.generic]:
    """A weight of a graph; its file may have other names, which onnx refuses to read."""
    from onnx import helper
    from onnx.numpy_helper import to_array

    if not tensor.external_data:
        return to_array(tensor)
    where = {entry.key: entry.value for entry in tensor.external_data}
    if where["location"] not in bundle.manifest.files:
        raise BundleError(f"{bundle.path}: '{where['location']}' is no file of the bundle; export it again")
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    size, start = math.prod(tensor.dims) * dtype.itemsize, int(where.get("offset", 0))
    stored = np.fromfile(bundle.file(where["location"]), np.uint8, size, offset=start)
    return stored.view(dtype).reshape(tensor.dims)


def _write(graph: onnx.ModelProto, directory: Path, state: dict[str, torch.Tensor]) -> None:
    """Write the weights of a graph over those in its weights file."""
    from onnx import helper

    for tensor in graph.graph.initializer:
        if tensor.name not in state:
            continue
        where = {entry.key: entry.value for entry in tensor.external_data}
        values = state[tensor.name].numpy().astype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
        with (directory / where["location"]).open("r+b") as file:
            file.seek(int(where["offset"]))
            file.write(values.tobytes())
