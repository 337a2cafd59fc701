"""``diagd export`` and ``diagd models``."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest

from diagd.bundle import Bundle
from diagd.cli.main import main
from tests.cli.conftest import Workplace
from tests.worlds import random_world


def test_the_bundle_says_what_it_is(workplace: Workplace) -> None:
    manifest = Bundle.open(workplace.bundle).manifest
    assert manifest.family == "world"
    assert manifest.tokenizer is not None
    assert manifest.provenance.source.endswith("model.safetensors")
    assert manifest.provenance.random_seed is None
    assert {"step.onnx", "weights.bin", "encoder.onnx", "decoder.onnx"} <= set(manifest.files)


def test_weights_are_aligned_and_shared(tmp_path: Path) -> None:
    import onnx

    world, bundle = random_world(tmp_path / "trained", size="0.7m"), tmp_path / "a.diagd"
    assert main(["export", "--model", "world", "--checkpoint", str(world), "--output", str(bundle)]) == 0
    graph = onnx.load(bundle / "step.onnx", load_external_data=False).graph
    places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in graph.initializer]
    external = [place for place in places if place]
    assert len(external) >= 30
    assert {place["location"] for place in external} == {"weights.bin"}
    assert all(int(place["offset"]) % 4096 == 0 for place in external)
    onnxruntime.InferenceSession(str(bundle / "step.onnx"))


def test_a_dry_run_writes_nothing(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--model", "mineworld-300m", "--random-weights", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "weights.bin" in printed
    assert "1,28" in printed  # 321 M parameters of 4 bytes
    assert "peak memory" in printed
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_loads_no_compiler(tmp_path: Path) -> None:
    code = """
import sys
from diagd.cli.main import main
for model in ("mineworld-300m", "wham-200m", "cosmos-4b"):
    assert main(["export", "--model", model, "--random-weights", "--dry-run"]) == 0
sys.exit("torch._dynamo" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.DEVNULL, check=True)


def test_half_precision_is_for_the_form_of_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", "--model", "mineworld-300m", "--random-weights", "--precision", "fp16", "--dry-run"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "step.modern" in printed
    assert "step.onnx" not in printed


def test_a_dry_run_predicts_the_size(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--model", "world", "--checkpoint", str(workplace.world), "--dry-run"]) == 0
    total = next(line for line in capsys.readouterr().out.splitlines() if "total" in line)
    predicted = float(total.split("│")[2].replace(",", ""))
    written = sum(file.stat().st_size for file in workplace.bundle.iterdir()) / 1e6
    assert predicted == pytest.approx(written, rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "mineworld-30m"], "did you mean 'mineworld-300m'"),
        (["--model", "mineworld-300m"], "withdrawn in May 2025"),
        (["--model", "mineworld-300m", "--checkpoint", "no.ckpt"], "no.ckpt"),
        (["--model", "mineworld-300m", "--checkpoint", "no.ckpt", "--dry-run"], "no checkpoint at 'no.ckpt'"),
        (["--model", "cosmos-4b", "--checkpoint", "no.pt", "--dry-run"], "no checkpoint at 'no.pt'"),
        (
            ["--model", "mineworld-300m", "--random-weights", "--set", "tokenizer=vae.ckpt"],
            "--set tokenizer=vae.ckpt and --random-weights: weights come from one of them",
        ),
        (["--model", "world"], "--checkpoint FOLDER"),
        (["--model", "crafter-3m", "--random-weights", "--seed", "-1"], "--seed -1: Input should be greater"),
        (["--model", "crafter-3m", "--form", "portable", "--set", "window=1"], "window 1 is outside 2..8"),
        (["--model", "crafter-3m", "--form", "portable", "--set", "window=9"], "window 9 is outside 2..8"),
        (["--model", "crafter-3m", "--checkpoint", ""], "empty"),
        (["--model", "mineworld-300m", "--checkpoint", " "], "empty"),
        (["--model", "cosmos-4b", "--checkpoint", "nvidia/C"], "did you mean 'hf://nvidia/C'?"),
        (["--model", "wham-200m", "--checkpoint", "https://hf.co/a/b"], "did you mean 'hf://a/b'?"),
        (["--model", "world", "--checkpoint", "nvidia/C"], "there is no nvidia/C; give the folder"),
        (
            ["--model", "mineworld-300m", "--random-weights", "--form", "fast"],
            "unknown form 'fast' (known: modern, portable, prefix)",
        ),
        (
            ["--model", "mineworld-300m", "--random-weights", "--precision", "fp16", "--form", "prefix"],
            "--form modern",
        ),
        (["--model", "mineworld-300m", "--random-weights", "--set", "width=3"], "did you mean 'widths'"),
    ],
)
def test_bad_input_names_the_fix(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", ["mineworld-300m", "wham-200m", "cosmos-4b", "crafter-3m"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<html>", "web page"),
        (b"", "empty"),
    ],
)
def test_what_is_no_checkpoint_is_one_line(
    workplace: Workplace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: str,
    content: bytes,
    message: str,
) -> None:
    folder = tmp_path / os.fsdecode(b"f\xff" if sys.platform == "linux" else b"f")
    shutil.copytree(workplace.world, folder)
    (folder / "model.safetensors").write_bytes(content)
    command = ["export", "--model", model, "--output", str(tmp_path / "a.diagd")]
    assert main([*command, "--checkpoint", str(folder)]) == 2
    assert main([*command, "--checkpoint", str(folder / "model.safetensors")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all(error.startswith("error: ") and message in error for error in errors)
    assert sorted(tmp_path.iterdir()) == [folder]


def test_the_file_that_is_named_is_exported(workplace: Workplace, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"w\xff" if sys.platform == "linux" else b"w")
    shutil.copytree(workplace.world, folder)
    named, usual = folder / "named.safetensors", folder / "model.safetensors"
    usual.rename(named)
    usual.write_bytes(b"")
    output = str(tmp_path / "a.diagd")
    assert main(["export", "--model", "world", "--checkpoint", str(named), "--output", output]) == 0
    exported = Bundle.open(Path(output)).manifest
    assert exported.provenance.source.endswith("named.safetensors")
    original = Bundle.open(workplace.bundle).manifest
    assert exported.files["weights.bin"] == original.files["weights.bin"]


def test_a_tokenizer_that_is_not_wanted_is_not_opened(workplace: Workplace, tmp_path: Path) -> None:
    world = shutil.copytree(workplace.world, tmp_path / "world")
    (world / "codebook.safetensors").unlink()
    command = [
        "export",
        "--model",
        "world",
        "--checkpoint",
        str(world),
        "--output",
        str(tmp_path / "a.diagd"),
    ]
    assert main(command) == 2
    assert main([*command, "--set", "tokenizer=none"]) == 0
    assert Bundle.open(tmp_path / "a.diagd").manifest.tokenizer is None


def test_checkpoints_of_another_model_are_refused(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = workplace.world / "model.safetensors"
    output = tmp_path / "a.diagd"
    args = ["--model", "mineworld-300m", "--checkpoint", str(file), "--output", str(output)]
    assert main(["export", *args]) == 2
    assert "model.embed_tokens.weight" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    rows = {row["model"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["mineworld-300m"]["parameters"] == pytest.approx(3.21e8, rel=1e-3)
    assert rows["mineworld-1200m"]["parameters"] == pytest.approx(1.2293e9, rel=1e-4)
    assert rows["mineworld-1200m"]["grid"] == "14 x 24"
    assert main(["models"]) == 0
    assert "mineworld-700m-32f" in capsys.readouterr().out.replace("\n", "")


def test_unexpected_errors_give_one_line_unless_debugged(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr("diagd.export.families.find", fail)
    assert main(["export", "--model", "mineworld-300m"]) == 1
    assert capsys.readouterr().err == (
        "internal error: ZeroDivisionError: planted; run again with --debug and report it\n"
    )
    assert main(["export", "--model", "mineworld-300m", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_full_disk_is_no_internal_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/full/weights.bin")

    monkeypatch.setattr("diagd.export.families.find", fail)
    assert main(["export", "--model", "mineworld-300m"]) == 2
    assert capsys.readouterr().err == (
        "error: /full/weights.bin: No space left on device; free some space or choose another place\n"
    )


def test_help_teaches_without_importing_torch() -> None:
    code = (
        "import sys; from diagd.cli.main import main\n"
        "try: main(['export', '--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'onnx', 'onnxruntime', 'av') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--random-weights" in done.stdout
    assert "examples:" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_packages_that_are_too_old_are_named(tmp_path: Path) -> None:
    """Whatever fails of it: this one lacks what is imported."""
    for folder in ("websockets", "websockets-12.0.dist-info"):
        (tmp_path / folder).mkdir()
    (tmp_path / "websockets/__init__.py").touch()
    (tmp_path / "websockets-12.0.dist-info/METADATA").write_text("Name: websockets\nVersion: 12.0\n")
    command, there = [sys.executable, "-m", "diagd", "play"], {"PYTHONPATH": str(tmp_path)}
    found = subprocess.run(command, env=os.environ | there, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "websockets 12.0, >=15 is needed, run: pip install 'diagd[play]'\n" in found.stderr
