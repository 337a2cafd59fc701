"""From what the user typed to a file of this machine: a path, a folder, a repository of the Hub."""

from __future__ import annotations

import difflib
import glob
import json
import re
from collections.abc import Collection
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote

from diagd.bundle.files import FULL
from diagd.errors import CheckpointError, command_line, require

_INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".jit")
_PREFERRED = (
    "model.safetensors.index.json",
    "model.safetensors",
    "model.pt",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "autoencoder.jit",  # holds what encoder.jit and decoder.jit hold
)
DISTRIBUTED = ".distcp"
"""How names of files end that `torch.distributed.checkpoint` writes."""

_SHARD = re.compile(r"-[0-9]+-of-[0-9]+\.")
_FORM = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@]+))?(?:/(?P<subpath>.*?))?/?")
_PAGE = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>[\w.-]+/[\w.-]+)"
    r"(?:/(?:blob|resolve|tree|raw)/(?P<revision>[^/?]+))?(?:/(?P<subpath>[^?]*?))?/?(?:\?.*)?"
)
_BARE = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?:@[^/@]+)?(?:/.*)?")


def is_index(name: str) -> bool:
    """Whether a file name is that of the index of a sharded set."""
    return name.lower().endswith(_INDEX_SUFFIXES)


def is_shard(source: str) -> bool:
    """Whether a path is that of one file of a sharded set."""
    return _SHARD.search(source.rpartition("/")[2]) is not None


def _is_checkpoint_name(name: str) -> bool:
    return name.lower().endswith((*_SUFFIXES, *_INDEX_SUFFIXES))


def choose_file(names: Collection[str], source: str) -> str:
    """The file to open among the names of a folder (not of its subfolders; hidden ones do not count).

    An index or a file of a usual name wins; CheckpointError where there is no single candidate else.
    """
    shown = sorted(name for name in names if not name.startswith("."))
    usual = [name for preferred in _PREFERRED for name in shown if name.lower() == preferred]
    found = usual[:1] or list(filter(is_index, shown)) or list(filter(_is_checkpoint_name, shown))
    if not found and any(name.endswith(DISTRIBUTED) for name in shown):
        raise CheckpointError(f"{source} {distributed(source)}")
    if not found:
        raise CheckpointError(
            f"{source} holds no checkpoint: found {_some(shown) or 'no file'}, expected a file ending in "
            f"{', '.join(_SUFFIXES)}"
        )
    if len(found) > 1:
        alone = all(map(is_shard, found))
        advice = (
            "shards without their index, NAME.index.json: download it too"
            if alone
            else "name the one you want"
        )
        raise CheckpointError(f"{source} holds {len(found)} checkpoints ({_some(found)}); {advice}")
    return found[0]


def distributed(folder: str) -> str:
    """What to say of a folder that `torch.distributed.checkpoint` wrote."""
    return (
        "is a distributed checkpoint; make one file of it with: python -m "
        "torch.distributed.checkpoint.format_utils dcp_to_torch " + command_line(folder, "model.pt")
    )


def shard_names(index: Path) -> dict[str, str]:
    """File of each tensor of a sharded set, from its index (``weight_map``).

    Raises:
        CheckpointError: the index is malformed or names something other than files beside it.
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"]
        shards = {str(tensor): str(shard) for tensor, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index} is not the index of a sharded checkpoint ({type(error).__name__}: {error}): expected "
            "an object with 'weight_map'; download it again"
        ) from error
    for shard in shards.values():
        beside = PurePosixPath(shard).name == shard and "\\" not in shard
        if not beside or is_index(shard) or not _is_checkpoint_name(shard):
            raise CheckpointError(
                f"{index} names the shard '{shard}', expected a file beside the index; do not use this file"
            )
    return shards


def local_file(path: Path, spec: str) -> Path:
    """The file to open at a path, typed as ``spec``, that may be a folder.

    Raises:
        CheckpointError: nothing is there, which names the likely cause; or a folder without a choice.
    """
    if path.is_dir():
        return path / choose_file([entry.name for entry in path.iterdir() if entry.is_file()], str(path))
    if path.is_file():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is neither a file nor a folder")
    wrong = f"no checkpoint at '{path}'"
    if address := _guess_address(spec):
        raise CheckpointError(f"{wrong}: no such file or folder; did you mean '{address}'?")
    if "://" in spec:
        raise CheckpointError(
            f"'{spec}' is no address that is read, only hf://org/name is; download the file and give its path"
        )
    if path.is_symlink():
        raise CheckpointError(f"{wrong}: it is a link to '{path.readlink()}', which does not exist")
    home = next(parent for parent in path.absolute().parents if parent.is_dir())
    missing = path.absolute().relative_to(home).parts[0]
    what = "no such file or folder" if home == path.absolute().parent else f"'{home}' has no '{missing}'"
    raise CheckpointError(f"{wrong}: {what}{_near(missing, home)}")


def _near(name: str, home: Path) -> str:
    try:
        present = sorted(entry.name for entry in home.iterdir() if not entry.name.startswith("."))
    except OSError:
        return ""
    if close := difflib.get_close_matches(name, present, n=3, cutoff=0.5):
        return "; did you mean " + " or ".join(f"'{home / near}'" for near in close) + "?"
    return f"; {home} holds {_some(present) or 'nothing'}"


def _some(names: Collection[str]) -> str:
    return ", ".join(list(names)[:8]) + (", ..." if len(names) > 8 else "")


class HubAddress(NamedTuple):
    """What an ``hf://`` address names; revision None is the default branch, subpath "" the top."""

    repo: str
    revision: str | None
    subpath: str

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf://{self.repo}{revision}" + (f"/{self.subpath}" if self.subpath else "")


def parse_address(spec: str) -> HubAddress:
    """Take ``hf://org/name[@revision][/subpath]``, ``%2F`` for a slash, apart; or CheckpointError."""
    match = _FORM.fullmatch(spec)
    if match is None:
        raise CheckpointError(
            f"'{spec}' is not an address on the Hugging Face Hub; expected hf://org/name@revision, "
            "with /path/of/a/file behind it if need be"
        )
    revision = match["revision"]
    return HubAddress(match["repo"], unquote(revision) if revision else None, match["subpath"] or "")


def _guess_address(spec: str) -> str | None:
    """The ``hf://`` address that a page of the Hub or a bare ``org/name`` stands for; None for a path."""
    if page := _PAGE.fullmatch(spec):
        return str(HubAddress(page["repo"], page["revision"], page["subpath"] or ""))
    first, *rest = spec.split("/")
    is_path = Path(first).exists() or (len(rest) == 1 and _is_checkpoint_name(spec))
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
    from huggingface_hub import HfApi, errors

    try:
        info = HfApi().model_info(address.repo, revision=address.revision)
        main = _main_file(address, {file.rfilename for file in info.siblings or ()})
        snapshot = _download(address, main)
    except CheckpointError:
        raise
    except errors.HFValidationError as error:
        raise CheckpointError(f"'{spec}' names no repository of the Hugging Face Hub: {error}") from error
    except Exception as error:
        # Which class a failed connection raises depends on the HTTP library of the installed version.
        if (cached := _cached(address)) is None:
            raise CheckpointError(_unavailable(address, error)) from error
        snapshot, main = cached
    return snapshot / main, str(HubAddress(address.repo, snapshot.name, main))


def _download(address: HubAddress, main: str) -> Path:
    """The snapshot with a file and, where that is an index, its shards of the same commit."""
    from huggingface_hub import snapshot_download

    def get(names: Collection[str], revision: str | None) -> Path:
        patterns = [glob.escape(name) for name in names]
        return Path(snapshot_download(address.repo, revision=revision, allow_patterns=patterns))

    snapshot = get([main], address.revision)
    if is_index(main):
        home = main.rpartition("/")[0]
        shards = set(shard_names(snapshot / main).values())
        get([main, *(f"{home}/{shard}".lstrip("/") for shard in shards)], snapshot.name)
    return snapshot


def _main_file(address: HubAddress, names: set[str]) -> str:
    if address.subpath in names:
        return address.subpath
    prefix = f"{address.subpath}/" if address.subpath else ""
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    where = str(address._replace(revision=None))
    if not inside:
        held = _some(sorted(names)) or "nothing"
        raise CheckpointError(f"{where} does not exist; the repository holds {held}")
    return prefix + choose_file([name for name in inside if "/" not in name], where)


def _cached(address: HubAddress) -> tuple[Path, str] | None:
    """The cached snapshot of an address's revision, and its checkpoint, if that is there with all shards."""
    from huggingface_hub import errors, snapshot_download

    try:
        snapshot = snapshot_download(address.repo, revision=address.revision, local_files_only=True)
    except errors.LocalEntryNotFoundError as absent:
        # A snapshot known to be incomplete is fine: only the checkpoint has to be there.
        snapshot = getattr(absent, "snapshot_path", None) or ""
    home = Path(snapshot) / address.subpath
    if not snapshot or not (home.is_file() or any(_is_checkpoint_name(file.name) for file in home.glob("*"))):
        return None
    held = {file.relative_to(snapshot).as_posix() for file in Path(snapshot).rglob("*") if file.is_file()}
    main = Path(snapshot) / (name := _main_file(address, held))
    shards = shard_names(main).values() if is_index(name) else ()
    return (Path(snapshot), name) if all(main.with_name(shard).is_file() for shard in shards) else None


def _unavailable(address: HubAddress, error: Exception) -> str:
    from huggingface_hub import constants, errors

    page = f"https://huggingface.co/{address.repo}"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{address} is gated: accept its terms at {page} and sign in with 'hf auth login' "
            "(or set HF_TOKEN)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"{address.repo} has no revision '{address.revision}' on the Hugging Face Hub; expected a "
            f"branch, tag or commit listed at {page}/commits"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no repository {address.repo} on the Hugging Face Hub that you may see: check the "
            "spelling, sign in with 'hf auth login' if it is private, or pass the path of your own copy"
        )
    if isinstance(error, OSError) and (error.filename is not None or error.errno in FULL):
        return (
            f"{address} cannot be kept in {constants.HF_HUB_CACHE}: {error.strerror}; free some space there, "
            "or set HF_HOME to a folder that can be written to"
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == HTTPStatus.UNAUTHORIZED:
        return (
            f"the Hugging Face Hub does not know the token that asks for {address}: sign in again with "
            "'hf auth login', or mend or unset HF_TOKEN"
        )
    wrong, remedy = "cannot reach the Hugging Face Hub for", "go online and unset HF_HUB_OFFLINE"
    if status is not None:
        wrong, remedy = "the Hugging Face Hub does not give", "try again later"
    reason = (str(error).strip().splitlines() or [""])[0][:200]
    return (
        f"{wrong} {address} and it is not in the local cache ({type(error).__name__}: {reason}); {remedy}, "
        f"or on another machine run 'hf download {address.repo} --local-dir FOLDER', copy FOLDER here and "
        "pass its path"
    )
