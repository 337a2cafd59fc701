"""TorchScript archives, read as data."""

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diagd.errors import CheckpointError
from diagd.export.checkpoints import Checkpoint, open_checkpoint, select
from diagd.export.checkpoints.torch_file import MappedTensor

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


class Convolution(torch.nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv3d = torch.nn.Conv3d(inside, outside, 1)

    def forward(self, video: Tensor) -> Tensor:
        made: Tensor = self.conv3d(video)
        return made


class Encoder(torch.nn.Module):
    """The key grammar of the Cosmos tokenizer, a few channels wide."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Module()
        self.encoder.conv_in = torch.nn.Sequential(Convolution(3, 4), Convolution(4, 4))
        self.encoder.register_buffer("wavelets", torch.ones(2))
        self.encoder.register_buffer("_arange", torch.arange(2), persistent=False)
        self.quant_conv = Convolution(4, 6)
        self.quantizer = torch.nn.Module()
        self.quantizer.register_buffer("_levels", torch.tensor([8, 8, 8, 5, 5, 5], dtype=torch.int32))
        self.names = ["a", "b"]
        self.scale = 2.0

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        constant = torch.tensor(3.0, dtype=video.dtype)
        buffer = self.encoder.get_buffer
        hidden = self.encoder.get_submodule("conv_in")(video) * buffer("wavelets")[0] * constant
        levels = self.quantizer.get_buffer("_levels") + buffer("_arange")[1]
        return self.quant_conv(hidden) * self.scale, levels


def assert_holds(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        assert checkpoint[name].dtype == str(tensor.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(checkpoint[name].read().astype(np.float32), tensor.float().numpy())


def test_traced_tokenizer_is_read_by_state_dict_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Encoder().bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, torch.ones(1, 3, 1, 2, 2, dtype=torch.bfloat16))
    traced.save(str(tmp_path / "encoder.jit"))
    checkpoint = open_checkpoint(tmp_path)
    assert_holds(checkpoint, module.state_dict())
    assert set(checkpoint) == {*module.state_dict(), "encoder._arange"}
    weights = select(checkpoint, lambda name: name if name.endswith(("weight", "bias")) else None)
    assert len(weights) == 6


def test_scripted_module_with_shared_parts(tmp_path: Path) -> None:
    shared = torch.nn.Linear(3, 3)
    module = torch.nn.Sequential(shared, torch.nn.ReLU(), shared, torch.nn.LayerNorm(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(str(tmp_path / "shared.jit"))
    checkpoint = open_checkpoint(tmp_path / "shared.jit")
    assert set(checkpoint) == set(module.state_dict())
    assert_holds(checkpoint, module.state_dict())
    first, second = checkpoint["0.weight"], checkpoint["2.weight"]
    assert isinstance(first, MappedTensor) and isinstance(second, MappedTensor)
    assert first.offset == second.offset


def test_code_of_the_archive_is_not_needed(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "whole.jit"))
    source = zipfile.ZipFile(tmp_path / "whole.jit")
    with zipfile.ZipFile(tmp_path / "data.jit", "w") as target:
        for name in source.namelist():
            if "/code/" not in name:
                target.writestr(name, source.read(name))
    assert set(open_checkpoint(tmp_path / "data.jit")) == {"weight", "bias"}
    with pytest.raises(RuntimeError):
        torch.jit.load(tmp_path / "data.jit")


def write_archive(path: Path, pickled: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", pickled)
        archive.writestr("m/constants.pkl", pickle.dumps((), protocol=2))


def test_modules_within_themselves_end(tmp_path: Path) -> None:
    # A module whose attribute "x" is the module itself.
    write_archive(tmp_path / "loop.jit", b"\x80\x02c__torch__\nA\n)\x81q\x00}X\x01\x00\x00\x00xh\x00sb.")
    with pytest.raises(CheckpointError, match="more than 10000 modules"):
        open_checkpoint(tmp_path / "loop.jit")


@pytest.mark.parametrize("pickled", [b"\x80\x02N.", b"\x80\x02c__torch__\nA\n)\x81."])
def test_archive_without_tensors(tmp_path: Path, pickled: bytes) -> None:
    write_archive(tmp_path / "none.jit", pickled)
    with pytest.raises(CheckpointError, match="no named tensors"):
        open_checkpoint(tmp_path / "none.jit")
