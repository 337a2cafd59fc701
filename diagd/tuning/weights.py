"""Weights that are tuned: read from a bundle or a checkpoint, and written back as they are stored there."""

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
from diagd.errors import BundleError, UsageError
from diagd.export.checkpoints import Checkpoint, check, save_tensors
from diagd.export.families import Family
from diagd.export.transformer import Transformer
from diagd.tuning.options import AlignOptions
from diagd.version import __version__

if TYPE_CHECKING:
    import onnx


_PREFIX = "transformer."


def read_model(bundle: Bundle) -> Transformer:
    """The transformer of a bundle in float32.

    Raises:
        BundleError, UsageError: its graphs are not of the transformer that its manifest describes.
    """
    found = {
        tensor.name: _values(tensor, bundle)
        for graph in _graphs(bundle)
        for tensor in graph.graph.initializer
        if tensor.name.startswith(_PREFIX)
    }
    model = Transformer(bundle.manifest.transformer)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in wanted.items():
        if _PREFIX + name not in found:
            raise UsageError(
                f"{bundle.path}: its graphs have no weight '{name}' of their own: they were exported before "
                "weights that are equal were kept apart; export the bundle again"
            )
        if found[_PREFIX + name].shape != shape:
            raise BundleError(
                f"{bundle.path}: weight '{name}' is {found[_PREFIX + name].shape}, its manifest describes "
                f"{shape}; export the bundle again"
            )
    arrays = {name: np.array(found[_PREFIX + name], np.float32) for name in wanted}
    model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    return model


def write_model(bundle: Bundle, model: Transformer, output: Path, manifest: Manifest) -> Path:
    """Write the bundle anew with the weights of ``model`` and ``manifest``; returns ``output``."""
    state = {_PREFIX + name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    with atomic_bundle(output) as directory:
        for name in bundle.manifest.named_files:
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


def aligned_manifest(bundle: Bundle, options: AlignOptions) -> Manifest:
    """The manifest of the new weights: where they come from, and the schedule most of them were made for."""
    diagonal = [pair for pair in options.shares if pair[1].k < bundle.manifest.layout.columns]
    _, schedule = max(diagonal or options.shares, key=itemgetter(0))
    shares = ", ".join(f"{each.name} {share:.2g}" for share, each in options.shares)
    tuned = f"aligned for {options.steps} steps to {shares}"
    return tuned_manifest(bundle, tuned, order=schedule.name, decoder="order")


def _graphs(bundle: Bundle) -> list[onnx.ModelProto]:
    import onnx

    names = [graph.file for graph in bundle.manifest.graphs]
    names += [bundle.manifest.text.graph] if bundle.manifest.text else []
    return [onnx.load(bundle.file(name), load_external_data=False) for name in dict.fromkeys(names)]


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
