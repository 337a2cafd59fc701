"""Where a page is written, of what, and by which runtime."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from diagd.bundle import Bundle
from diagd.bundle.manifest import Manifest
from diagd.cli.main import main
from diagd.errors import BundleError, UsageError
from diagd.progress import Progress
from diagd.web.folder import DIGESTS, VERSION, runtime_files, write_page
from tests.web.conftest import Serve
from tests.worlds import random_world


def some() -> dict[str, bytes]:
    """What will not be run."""
    return dict.fromkeys(DIGESTS, b"code")


def nothing() -> dict[str, bytes]:
    raise AssertionError("no runtime is needed to refuse")


def test_a_folder_of_something_else_is_refused_and_a_users_file_stays(world: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "index.html").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        write_page(Bundle.open(world), other, nothing)
    assert [file.name for file in other.iterdir()] == ["index.html"]
    page = write_page(Bundle.open(world), tmp_path / "page", some).path
    (page / "CNAME").write_text("play.example")
    (page / "style.css").write_text("old")
    again = write_page(Bundle.open(world), page, some)
    assert (page / "CNAME").read_text() == "play.example"
    assert "--ground" in (page / "style.css").read_text()
    names = {file.name for file in page.iterdir()}
    assert names == {*again.sizes, "CNAME"}
    told = json.loads((page / "world.json").read_text())
    for damage in ({"files": 5}, {"format": "diagd web 1"}):
        (page / "world.json").write_text(json.dumps({"format": told["format"]} | damage))
        with pytest.raises(UsageError, match="is damaged"):
            write_page(Bundle.open(world), page, some)
    assert (page / "CNAME").read_text() == "play.example"


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_bundle_of_links_is_packed_as_any(
    link: Callable[[str, str], None], world: Path, tmp_path: Path
) -> None:
    linked = Path(shutil.copytree(world, tmp_path / "linked.diagd", copy_function=link))
    plain, other = (
        {
            part.name: part.read_bytes()
            for part in write_page(Bundle.open(bundle), bundle.parent / name, some).path.iterdir()
        }
        for bundle, name in ((linked, "page"), (Path(shutil.copytree(world, tmp_path / "a.diagd")), "other"))
    )
    assert plain == other


def test_a_bundle_that_another_replaces_meanwhile_is_not_mixed_with_it(world: Path, tmp_path: Path) -> None:
    """As by an export while the runtime is fetched: the page had the one's world and the other's weights."""
    path = Path(shutil.copytree(world, tmp_path / "world.diagd"))
    output = tmp_path / "page"

    def slow() -> dict[str, bytes]:
        trained = random_world(tmp_path / "trained", size="0.7m")
        source = ("--model", "world", "--checkpoint", str(trained), "--output", str(path))
        assert main(["export", *source]) == 0
        return some()

    with pytest.raises(BundleError, match="another bundle took the place of"):
        write_page(Bundle.open(path), output, slow)
    assert not output.exists()


def test_a_page_has_the_window_and_precision_asked_for(page: Path, world: Path, tmp_path: Path) -> None:
    told = json.loads((page / "world.json").read_text())
    assert told["record"]["bundle"] == Bundle.open(world).digest
    assert (told["record"]["precision"], told["record"]["window"], told["window"]) == ("fp32", 4, 4)
    with pytest.raises(UsageError, match="window 9"):
        write_page(Bundle.open(world), tmp_path / "page", nothing, window=9)
    with pytest.raises(UsageError, match="no int4 graph"):
        write_page(Bundle.open(world), tmp_path / "page", nothing, precision="int4")
    assert not (tmp_path / "page").exists()


def test_what_a_page_cannot_play_is_refused(world: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(world)

    def altered(**changes: object) -> Bundle:
        return replace(bundle, manifest=Manifest.model_copy(bundle.manifest, update=changes))

    with pytest.raises(UsageError, match="has no tokenizer"):
        write_page(altered(tokenizer=None), tmp_path / "page", nothing)
    graph = bundle.manifest.graphs[0]
    with pytest.raises(UsageError, match="int8; a page takes float32"):
        write_page(
            altered(graphs=(graph.model_copy(update={"cache_dtype": "int8"}),)), tmp_path / "page", nothing
        )


def test_a_runtime_is_taken_from_a_folder_and_checked(runtime: dict[str, bytes], tmp_path: Path) -> None:
    dist = tmp_path / "onnxruntime-web" / "dist"
    dist.mkdir(parents=True)
    for name, content in runtime.items():
        (dist / name).write_bytes(content)
    assert runtime_files(tmp_path / "onnxruntime-web", Progress()) == runtime
    with tarfile.open(tmp_path / "runtime.tgz", "w") as archive:
        archive.add(tmp_path / "onnxruntime-web", "package")
    assert runtime_files(tmp_path / "runtime.tgz", Progress()).keys() == DIGESTS.keys()
    (dist / next(iter(DIGESTS))).write_bytes(b"other")
    with pytest.raises(UsageError, match=f"onnxruntime-web {VERSION}"):
        runtime_files(tmp_path / "onnxruntime-web", Progress())
    (tmp_path / "none").write_text("no archive")
    with pytest.raises(UsageError, match="expected the archive"):
        runtime_files(tmp_path / "none", Progress())


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x1f\x8b\x08\0", b"BZh91AY&SY"])
def test_what_is_no_archive_of_the_runtime_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "runtime.tgz").write_bytes(content)
    with pytest.raises(UsageError, match=r"--runtime .*runtime\.tgz"):
        runtime_files(tmp_path / "runtime.tgz", Progress())


def test_what_an_archive_is_not_is_told_in_one_line(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runtime.tgz").write_text("no archive")  # tarfile tells of every format, each on a line
    words = [
        "web",
        str(world),
        "--output",
        str(tmp_path / "page"),
        "--runtime",
        str(tmp_path / "runtime.tgz"),
    ]
    assert main(words) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_archive_that_is_cut_off_is_refused(runtime: dict[str, bytes], tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "whole.tgz", "w:gz") as archive:
        name = min(DIGESTS, key=lambda each: len(runtime[each]))
        member = tarfile.TarInfo(f"package/dist/{name}")
        member.size = len(runtime[name])
        archive.addfile(member, io.BytesIO(runtime[name]))
    whole = (tmp_path / "whole.tgz").read_bytes()
    (tmp_path / "cut.tgz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"--runtime .*cut\.tgz"):
        runtime_files(tmp_path / "cut.tgz", Progress())


def test_the_command_says_what_a_browser_loads(
    world: Path, runtime: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in runtime.items():
        (tmp_path / name).write_bytes(content)
    command = ["web", str(world), "--output", str(tmp_path / "page"), "--runtime", str(tmp_path)]
    assert main(command) == 0
    loaded = re.search(r"a browser loads (\d+\.\d\d) MB", capsys.readouterr().out)
    assert loaded is not None
    files = [file for file in (tmp_path / "page").iterdir() if not file.name.startswith("encoder.")]
    assert float(loaded[1]) == pytest.approx(sum(file.stat().st_size for file in files) / 1e6, abs=0.005)


def test_the_server_isolates_the_page(page: Path, serve: Serve) -> None:
    with serve(page) as url, urllib.request.urlopen(f"{url}engine.js") as answer:
        assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        assert answer.headers["Content-Type"] == "text/javascript"
        assert answer.read() == (page / "engine.js").read_bytes()
