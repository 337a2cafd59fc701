"""Checkpoints on the Hugging Face Hub: only the files needed, through its own cache."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from diagd.errors import CheckpointError, require
from diagd.export.checkpoints import folder

_FORM = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@]+))?(?:/(?P<subpath>.*?))?/?")
_PAGE = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>[\w.-]+/[\w.-]+)"
    r"(?:/(?:blob|resolve|tree|raw)/(?P<revision>[^/?]+))?(?:/(?P<subpath>[^?]*?))?/?(?:\?.*)?"
)
_BARE = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?:@[^/@]+)?(?:/.*)?")


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

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repo}{revision}" + (f"/{self.subpath}" if self.subpath else "")


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


def guess_address(spec: str) -> str | None:
    """The ``hf://`` address that a page of the Hub or a bare ``org/name`` stands for; None for a path."""
    if page := _PAGE.fullmatch(spec):
        return str(HubAddress(page["repo"], page["revision"], page["subpath"] or ""))
    first, *rest = spec.split("/")
    is_path = Path(first).exists() or (len(rest) == 1 and folder.is_checkpoint_name(spec))
    return None if is_path or not _BARE.fullmatch(spec) else f"hf://{spec}"


def fetch(spec: str) -> tuple[Path, str]:
    """Download what an address names, or find it in the cache when the Hub does not give it.

    Of a folder, only the checkpoint that `choose_file` picks is downloaded, with all its shards.

    Returns:
        File or index in the local cache, and its ``hf://`` address with the commit that was resolved.

    Raises:
        CheckpointError: the Hub has no such repository, revision or file, grants no access or is out of
            reach, and the cache has no copy.
        DependencyError: huggingface_hub is not installed.
    """
    address = parse_address(spec)
    require("huggingface_hub", extra="export", purpose="read hf:// checkpoints")
    from huggingface_hub import HfApi, snapshot_download

    def get(patterns: Collection[str], revision: str | None) -> Path:
        escaped = [glob.escape(pattern) for pattern in patterns]
        return Path(snapshot_download(address.repo, revision=revision, allow_patterns=escaped))

    try:
        info = HfApi().model_info(address.repo, revision=address.revision)
        main = _main_file(address, {file.rfilename for file in info.siblings or ()})
        snapshot = _download(main, address.revision, get)
    except CheckpointError:
        raise
    except Exception as error:
        # Which class a failed connection raises depends on the HTTP library of the installed version.
        cached = _cached(address)
        if cached is None:
            raise _unavailable(address, error) from error
        snapshot = cached
        held = (path.relative_to(snapshot) for path in snapshot.rglob("*") if path.is_file())
        main = _main_file(address, {path.as_posix() for path in held})
    return snapshot / main, str(HubAddress(address.repo, snapshot.name, main))


def _download(main: str, revision: str | None, get: Callable[[Collection[str], str | None], Path]) -> Path:
    """The snapshot with a file and, where that is an index, its shards of the same commit."""
    snapshot = get([main], revision)
    if folder.is_index(main):
        home = main.rpartition("/")[0]
        shards = set(folder.shard_names(snapshot / main).values())
        get([main, *(f"{home}/{shard}".lstrip("/") for shard in shards)], snapshot.name)
    return snapshot


def _main_file(address: HubAddress, names: set[str]) -> str:
    if address.subpath in names:
        return address.subpath
    prefix = f"{address.subpath}/" if address.subpath else ""
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    where = str(address._replace(revision=None))
    if not inside:
        held = ", ".join(sorted(names)[:8]) + (", ..." if len(names) > 8 else "")
        raise CheckpointError(f"{where} does not exist; the repository holds {held or 'nothing'}")
    return prefix + folder.choose_file([name for name in inside if "/" not in name], where)


def _cached(address: HubAddress) -> Path | None:
    """The cached snapshot of an address's revision, if it holds what is asked for."""
    from huggingface_hub import errors, snapshot_download

    try:
        snapshot = snapshot_download(address.repo, revision=address.revision, local_files_only=True)
    except errors.LocalEntryNotFoundError as absent:
        # A snapshot known to be incomplete is fine: only the checkpoint has to be there.
        snapshot = getattr(absent, "snapshot_path", None) or ""
    return Path(snapshot) if snapshot and (Path(snapshot) / address.subpath).exists() else None


def _unavailable(address: HubAddress, error: Exception) -> CheckpointError:
    from huggingface_hub import errors

    page = f"https://huggingface.co/{address.repo}"
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"{address} is gated: accept its terms at {page} and sign in with 'hf auth login' "
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
    reason = (str(error).strip().splitlines() or [""])[0][:200]
    return CheckpointError(
        f"cannot reach the Hugging Face Hub for {address} and it is not in the local cache "
        f"({type(error).__name__}: {reason}); go online and unset HF_HUB_OFFLINE, or on another "
        f"machine run 'hf download {address.repo} --local-dir FOLDER', copy FOLDER here and pass its path"
    )
