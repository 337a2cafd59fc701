"""Checkpoints on the Hugging Face Hub: only the files needed, through its own cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from diagd.errors import CheckpointError, require
from diagd.export.checkpoints import folder

_FORM = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@]+))?(?:/(?P<subpath>.*?))?/?")


class HubAddress(NamedTuple):
    """What an ``hf://`` address names.

    Attributes:
        repo: ``org/name``.
        revision: branch, tag or commit, or None for the default branch.
        subpath: file or folder within the repository, "" for its top.
    """

    repo: str
    revision: str | None
    subpath: str


class Fetched(NamedTuple):
    """A local copy.

    Attributes:
        path: file, index or folder in the local cache.
        source: ``hf://`` address with the commit that was resolved.
    """

    path: Path
    source: str


def parse_address(spec: str) -> HubAddress:
    """Take ``hf://org/name[@revision][/subpath]`` apart; a slash within a revision is written ``%2F``.

    Raises:
        CheckpointError: the address has another form.
    """
    match = _FORM.fullmatch(spec)
    if match is None:
        raise CheckpointError(
            f"'{spec}' is not an address on the Hugging Face Hub; expected hf://org/name@revision, "
            "with /path/of/a/file behind it if need be"
        )
    revision = match["revision"]
    return HubAddress(match["repo"], unquote(revision) if revision else None, match["subpath"] or "")


def fetch(spec: str) -> Fetched:
    """Download what an address names, or find it in the cache when the Hub does not give it.

    Of a folder, only the checkpoint that `choose_file` picks is downloaded, with all its shards.

    Raises:
        CheckpointError: the Hub has no such repository, revision or file, grants no access or is out of
            reach, and the cache has no copy.
        DependencyError: huggingface_hub is not installed.
    """
    address = parse_address(spec)
    require("huggingface_hub", extra="export", purpose="read hf:// checkpoints")
    try:
        path = _download(address)
    except CheckpointError:
        raise
    except Exception as error:
        # Which class a failed connection raises depends on the HTTP library of the installed version.
        cached = _cached(address)
        if cached is None:
            raise _unavailable(address, error) from error
        path = cached
    return Fetched(path, _source(address, path))


def _download(address: HubAddress) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().model_info(address.repo, revision=address.revision)
    names = {file.rfilename for file in info.siblings or ()}
    main = _main_file(address, names)
    path = Path(hf_hub_download(address.repo, main, revision=address.revision))
    if main.endswith(folder.INDEX_SUFFIXES):
        home = main.rpartition("/")[0]
        for shard in dict.fromkeys(folder.shard_names(path).values()):
            # The commit, so that all shards are of the version of the index.
            hf_hub_download(address.repo, f"{home}/{shard}".lstrip("/"), revision=info.sha)
    return path


def _main_file(address: HubAddress, names: set[str]) -> str:
    if address.subpath in names:
        return address.subpath
    prefix = f"{address.subpath}/" if address.subpath else ""
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    where = f"hf://{address.repo}" + (f"/{address.subpath}" if prefix else "")
    if not inside:
        held = ", ".join(sorted(names)[:8]) + (", ..." if len(names) > 8 else "")
        raise CheckpointError(f"{where} does not exist; the repository holds {held or 'nothing'}")
    return prefix + folder.choose_file([name for name in inside if "/" not in name], where)


def _cached(address: HubAddress) -> Path | None:
    """The address within the cached snapshot of its revision, if it is there."""
    from huggingface_hub import errors, snapshot_download

    try:
        snapshot = snapshot_download(address.repo, revision=address.revision, local_files_only=True)
    except errors.LocalEntryNotFoundError as absent:
        # A snapshot known to be incomplete is fine: only the checkpoint has to be there.
        snapshot = getattr(absent, "snapshot_path", "")
    path = Path(snapshot) / address.subpath
    if not snapshot or not path.exists():
        return None
    if path.is_dir():
        names = [entry.name for entry in path.iterdir() if entry.is_file()]
        return path / folder.choose_file(names, str(path))
    return path


def _unavailable(address: HubAddress, error: Exception) -> CheckpointError:
    from huggingface_hub import errors

    page = f"https://huggingface.co/{address.repo}"
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"{_spell(address)} is gated: accept its terms at {page} and sign in with 'hf auth login' "
            "(or set HF_TOKEN)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(
            f"{address.repo} has no revision '{address.revision}' on the Hugging Face Hub; expected a "
            f"branch, tag or commit listed at {page}/commits"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(
            f"there is no repository {address.repo} on the Hugging Face Hub that you may see: check the "
            "spelling, sign in with 'hf auth login' if it is private, or pass the path of your own copy"
        )
    return CheckpointError(
        f"cannot reach the Hugging Face Hub for {_spell(address)} and it is not in the local cache "
        f"({type(error).__name__}: {_first_line(error)}); go online and unset HF_HUB_OFFLINE, or on another "
        f"machine run 'hf download {address.repo} --local-dir FOLDER', copy FOLDER here and pass its path"
    )


def _source(address: HubAddress, path: Path) -> str:
    """The address with the commit and file of a path in the cache."""
    home = "models--" + address.repo.replace("/", "--")
    _, commit, *inside = path.parts[path.parts.index(home) + 1 :]
    return _spell(HubAddress(address.repo, commit, "/".join(inside)))


def _spell(address: HubAddress) -> str:
    revision = f"@{address.revision}" if address.revision else ""
    return f"hf://{address.repo}{revision}" + (f"/{address.subpath}" if address.subpath else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
