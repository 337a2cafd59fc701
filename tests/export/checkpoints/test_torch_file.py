"""Files in the layouts of the released Cosmos, MineWorld and WHAM checkpoints."""

import json
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diagd.errors import CheckpointError
from diagd.export.checkpoints import Checkpoint, open_checkpoint, select
from diagd.export.checkpoints.torch_file import MappedTensor
from tests.export.checkpoints.foreign import MODULE, write_wham


def random_weights(names: Sequence[str], seed: int = 0) -> OrderedDict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return OrderedDict((name, torch.randn(4, 6, generator=generator)) for name in names)


def assert_same(checkpoint: Checkpoint, weights: Mapping[str, Tensor]) -> None:
    assert list(checkpoint) == list(weights)
    for name, tensor in weights.items():
        np.testing.assert_array_equal(
            checkpoint[name].read().astype(np.float32), tensor.detach().float().numpy()
        )


@pytest.mark.parametrize("wrap", [lambda weights: weights, lambda weights: {"model": weights}])
def test_cosmos_model_pt(tmp_path: Path, wrap: Callable[[Mapping[str, Tensor]], object]) -> None:
    weights = random_weights(["model.tok_embeddings.weight", "model.layers.0.attention.wq.weight"])
    weights = OrderedDict((name, tensor.bfloat16()) for name, tensor in weights.items())
    extra = {"model.layers.0.attention.core._extra_state": None}
    torch.save(wrap(OrderedDict(**weights, **extra)), tmp_path / "model.pt")
    checkpoint = open_checkpoint(tmp_path)
    assert_same(checkpoint, weights)
    assert {handle.dtype for handle in checkpoint.values()} == {"bfloat16"}
    assert checkpoint.source == str(tmp_path / "model.pt")
    stripped = select(checkpoint, lambda name: name.removeprefix("model."))
    assert list(stripped) == ["tok_embeddings.weight", "layers.0.attention.wq.weight"]


def test_state_dict_of_a_module_with_metadata_and_parameters(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
    torch.save({"state_dict": module.state_dict()}, tmp_path / "300M_16f.ckpt")
    checkpoint = open_checkpoint(tmp_path / "300M_16f.ckpt")
    assert_same(checkpoint, module.state_dict())
    assert checkpoint["1.num_batches_tracked"].dtype == "int64"
    torch.save(dict(module.named_parameters()), tmp_path / "parameters.bin")
    assert_same(open_checkpoint(tmp_path / "parameters.bin"), dict(module.named_parameters()))


def test_wham_with_foreign_classes(tmp_path: Path) -> None:
    weights = random_weights(["predictor.gpt_model.transformer.wte.weight"])
    weights["predictor.gpt_model.lm_head.weight"] = weights["predictor.gpt_model.transformer.wte.weight"]
    path = tmp_path / "WHAM_200M.ckpt"
    write_wham(path, weights)
    with pytest.raises((ModuleNotFoundError, AttributeError)):
        torch.load(path, weights_only=False)  # the file does need classes that are not there
    checkpoint = open_checkpoint(path)
    assert_same(checkpoint, weights)
    tied = [handle.offset for handle in checkpoint.values() if isinstance(handle, MappedTensor)]
    assert tied[0] == tied[1]
    read: dict[str, Any] = checkpoint.metadata
    assert read == {
        "epoch": 3,
        "global_step": 200000,
        "pytorch-lightning_version": "1.9.0",
        "hparams_name": "kwargs",
        "hyper_parameters": {
            "__class__": f"{MODULE}.Attributes",
            "context_encoder_args": {
                "images": {
                    "__class__": f"{MODULE}.CreationArgs",
                    "pl_class": f"{MODULE}.Encoder",
                    "pl_checkpoint_path": read["hyper_parameters"]["context_encoder_args"]["images"][
                        "pl_checkpoint_path"
                    ],
                    "pl_kwargs": {
                        "vqgan": {
                            "ch_mult": [1, 2],
                            "size": {"__class__": f"{MODULE}.Size", "__args__": [8, 4]},
                        }
                    },
                }
            },
            "variant": {"n": 2},
        },
    }
    assert "PurePosixPath" in json.dumps(checkpoint.metadata)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_unusable_dtypes_are_listed_but_not_read(tmp_path: Path) -> None:
    tensors = {
        "fp8": torch.zeros(4, dtype=torch.float8_e4m3fn),
        "quantised": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "complex": torch.ones(2, dtype=torch.complex64).conj(),
        "words": torch.arange(3).to(torch.uint16),
    }
    torch.save(tensors, tmp_path / "odd.pt")
    checkpoint = open_checkpoint(tmp_path / "odd.pt")
    assert [handle.dtype.split(" ")[0] for handle in checkpoint.values()] == [
        "float8_e4m3fn",
        "qint8",
        "complex64",
        "uint16",
    ]
    np.testing.assert_array_equal(checkpoint["words"].read(), [0, 1, 2])
    for name in ("fp8", "quantised", "complex"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            checkpoint[name].read()


def test_negative_view_is_not_taken_for_its_stored_values(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2, dtype=torch.complex64).conj().imag}, tmp_path / "negative.pt")
    with pytest.raises(CheckpointError, match="neg"):
        open_checkpoint(tmp_path / "negative.pt")["w"].read()


@pytest.mark.parametrize("key", ["model_state_dict", "module"])
def test_entry_of_the_weights_beside_other_tensors(tmp_path: Path, key: str) -> None:
    """As PyTorch's tutorials, which keep the loss, and DeepSpeed name it."""
    weights = random_weights(["a.weight"])
    optimiser = {"state": {0: {"step": torch.tensor(1.0)}}}
    torch.save({"epoch": 1, key: weights, "optimizer": optimiser, "loss": torch.ones(())}, tmp_path / "a.pt")
    assert_same(open_checkpoint(tmp_path / "a.pt"), weights)


def test_pickle_of_a_later_protocol(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt", pickle_protocol=4)
    with pytest.raises(CheckpointError, match="save it without pickle_protocol"):
        open_checkpoint(tmp_path / "w.pt")


class PickledModel:
    pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (PickledModel(), r"pickled tests\..*PickledModel.*state_dict"),
        ([torch.ones(2)], "pickled list"),
        ({"weights": {"w": torch.ones(2)}, "step": 3}, "no tensors .* it has: weights, step"),
        ({"step": 3, "weights": {"w": torch.ones(2)}}, "tensors are under 'weights': save that alone"),
        ({}, "it has: nothing"),
        ({"state_dict": {}}, "no named tensors"),
    ],
)
def test_objects_that_are_no_state_dict(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "model.pt")


def rewrite(
    source: Path,
    target: Path,
    *,
    compression: int = zipfile.ZIP_STORED,
    change: Callable[[str, bytes], bytes | None] = lambda name, content: content,
) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)


def test_archive_that_was_packed_again(tmp_path: Path) -> None:
    """``torch.load`` under a fake mode adds up sizes instead of looking, and finds other bytes here."""
    weights = random_weights(["a", "b", "c"])
    torch.save(weights, tmp_path / "good.pt")
    rewrite(tmp_path / "good.pt", tmp_path / "again.pt")
    assert_same(open_checkpoint(tmp_path / "again.pt"), weights)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"compression": zipfile.ZIP_DEFLATED}, "compressed"),
        ({"change": lambda name, text: None if name.endswith("data/0") else text}, "lacks its part 'data/0'"),
        ({"change": lambda name, text: text[:-8] if name.endswith("data/0") else text}, "up to byte 96"),
        ({"change": lambda name, text: b"big" if name.endswith("byteorder") else text}, "big-endian"),
        ({"change": lambda name, text: text[:40] if name.endswith(".pkl") else text}, "damaged pickle"),
        ({"change": lambda name, text: None if name.endswith(".pkl") else text}, "did not write"),
    ],
)
def test_damaged_archives(tmp_path: Path, damage: dict[str, Any], message: str) -> None:
    torch.save(random_weights(["w"]), tmp_path / "good.pt")
    rewrite(tmp_path / "good.pt", tmp_path / "same.pt")
    assert_same(open_checkpoint(tmp_path / "same.pt"), random_weights(["w"]))
    rewrite(tmp_path / "good.pt", tmp_path / "bad.pt", **damage)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "bad.pt")


def test_bytes_overwritten_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(random_weights(["w"]), path)
    content = bytearray(path.read_bytes())
    member = next(info for info in zipfile.ZipFile(path).infolist() if info.filename.endswith("data/0"))
    content[member.header_offset : member.header_offset + 4] = struct.pack("<I", 0)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"damaged at byte {member.header_offset}"):
        open_checkpoint(path)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_truncated_download(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "w.pt"
    torch.save(random_weights(["w", "v"]), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match="cut short"):
        open_checkpoint(path)
