"""``diagd build`` end to end, with TensorRT-RTX on a machine without a GPU."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diagd.bundle import Bundle, Form
from diagd.bundle.transformer import linear_rotary
from diagd.cli.main import main
from diagd.engines.devices.cuda import open_driver
from diagd.engines.tensorrt import import_tensorrt
from diagd.engines.tensorrt.builder import Request
from diagd.engines.tensorrt.opening import ANY, EngineStore, compile_engine
from diagd.errors import BundleError, DiagdError
from diagd.export.options import GraphOptions
from diagd.export.transformer import Transformer
from diagd.progress import Progress
from diagd.schedule import StreamLayout
from tests.models import export_small
from tests.oracles.models import small_model

pytest.importorskip("tensorrt_rtx")
RTX = ("--runtime", "tensorrt_rtx")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = small_model(StreamLayout(2, 3, after=1), layers=1, context_frames=4).config
    config = replace(small, hidden=64, head_size=32, rotary=linear_rotary(32, 1e4))
    model = Transformer(config).initialise(torch.Generator().manual_seed(0)).eval()
    path = tmp_path_factory.mktemp("bundle") / "small.diagd"
    return export_small(model, path, GraphOptions((Form.MODERN,), "fp16", widths=(1, 8)))


def test_a_bundle_is_built_for_named_gpus(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(bundle), "--target", "sm89,SM86,sm89", "--widths", "8,4", *RTX]) == 0
    assert "built modern fp16 widths 4,8 for sm86,sm89" in " ".join(capsys.readouterr().out.split())
    (stored,) = EngineStore(Bundle.open(bundle))
    fingerprint = stored.record.fingerprint
    assert (fingerprint.widths, fingerprint.targets, fingerprint.device) == ((4, 8), ("sm86", "sm89"), ANY)
    assert stored.plan.stat().st_size == stored.record.bytes


def test_a_dry_run_builds_nothing(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = list(bundle.rglob("*"))
    assert main(["build", str(bundle), "--dry-run", *RTX]) == 0
    assert "nothing was built" in capsys.readouterr().out
    assert list(bundle.rglob("*")) == before


def test_engines_outlive_a_calibration(bundle: Path, tmp_path: Path) -> None:
    """A further precision changes nothing for those that are compiled."""
    copy = tmp_path / "small.diagd"
    shutil.copytree(bundle, copy, ignore=shutil.ignore_patterns("engines"))
    assert main(["build", str(copy), "--target", "sm89", "--widths", "4", *RTX]) == 0
    (built,) = EngineStore(Bundle.open(copy))
    assert main(["calibrate", str(copy), "--precision", "int8-weight", "--budget", "none"]) == 0
    store = EngineStore(Bundle.open(copy))
    assert store.find(built.record.fingerprint) == built
    assert not any(name.startswith("engines") for name in store.bundle.manifest.files)


class Removing(Progress):
    """Removes a bundle while it is built."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @contextmanager
    def count(self, *told: object) -> Iterator[Callable[[int], None]]:
        shutil.rmtree(self.path, ignore_errors=True)
        yield lambda _: None


def test_where_no_engine_can_be_kept_none_is_built(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told ahead of minutes of work; and none is put where the bundle was, which nothing could replace."""
    copy = Path(shutil.copytree(bundle, tmp_path / "small.diagd", ignore=shutil.ignore_patterns("engines")))
    (copy / "engines").write_text("mine")
    assert main(["build", str(copy), "--target", "sm89", "--widths", "4", *RTX]) == 2
    assert "engines is no directory that can be written to" in " ".join(capsys.readouterr().err.split())
    (copy / "engines").unlink()
    request = Request(40, Form.MODERN, (4,), ("sm89",))
    with pytest.raises(BundleError):
        compile_engine(Bundle.open(copy), request, import_tensorrt("tensorrt_rtx"), progress=Removing(copy))
    assert not list(tmp_path.iterdir())


def test_a_path_is_printed_as_it_is(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On one line, so that it can be copied; brackets are no markup; a shell takes the line that mends."""
    odd = tmp_path / ("a [bold]world " + "x" * 80)
    shutil.copytree(bundle, odd)
    assert main(["build", str(odd), "--target", "sm89", "--widths", "4", *RTX]) == 0
    (stored,) = [e for e in EngineStore(Bundle.open(odd)) if e.record.fingerprint.targets == ("sm89",)]
    assert f"MB at {stored.plan}\n" in capsys.readouterr().out
    line = shlex.split(EngineStore(Bundle.open(odd)).build_line(stored.record.fingerprint))
    assert line[:2] == ["diagd-build", str(odd)]
    assert main(["build", str(odd), "--dry-run", *RTX]) == 0
    assert "[bold]" in capsys.readouterr().out


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "sm90"], "has no target sm90; it builds for sm75"),
        (["--precision", "fp32"], "has no fp32 graph (it has fp16)"),
        (
            ["--form", "portable", "--target", "sm89"],
            "no portable graph; export it again with --form portable",
        ),
        (
            ["--form", "prefix", "--target", "sm89"],
            "--form prefix: TensorRT compiles modern and portable graphs",
        ),
        (["--target", "sm89", "--widths", "64"], "width 64 is above 8"),
        (["--widths", "a,b"], "--widths a,b: expected whole numbers such as"),
        (["--widths", "0"], "at least one row"),
    ],
)
def test_what_cannot_be_built_is_said(
    bundle: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str, dry_run: bool
) -> None:
    assert main(["build", str(bundle), *options, *RTX, *(["--dry-run"] if dry_run else [])]) != 0
    assert message in capsys.readouterr().err


def test_without_a_gpu_the_targets_are_asked_for(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        open_driver()
    except DiagdError:
        assert main(["build", str(bundle), *RTX]) != 0
        assert "--target" in capsys.readouterr().err
    else:
        pytest.skip("this machine has a CUDA device")
