"""What to say about a path that does not exist."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from diagd.errors import CheckpointError


def no_such_path(spec: str) -> CheckpointError:
    """An error that names the nearest existing folder and files, or the likely cause."""
    if os.name == "posix" and (re.match(r"[A-Za-z]:[\\/]", spec) or "\\" in spec):
        return CheckpointError(
            f"no checkpoint at '{spec}': this is a Windows path and this system uses forward slashes; "
            f"did you mean '{_posix_guess(spec)}'?"
        )
    path = Path(spec).expanduser()
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    if folder != path.absolute().parent:
        missing = path.absolute().relative_to(folder).parts[0]
        return CheckpointError(
            f"no checkpoint at '{spec}': '{folder}' has no '{missing}'{_near(missing, folder)}"
        )
    return CheckpointError(f"no checkpoint at '{spec}': no such file or folder{_near(path.name, folder)}")


def _posix_guess(spec: str) -> str:
    path = spec.replace("\\", "/")
    # Where Linux runs under Windows (WSL), drive C: is mounted at /mnt/c.
    return f"/mnt/{path[0].lower()}{path[2:]}" if path[1:2] == ":" else path


def _near(name: str, folder: Path) -> str:
    try:
        present = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError:
        return ""
    close = difflib.get_close_matches(name, present, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(f"'{folder / near}'" for near in close) + "?"
    held = ", ".join(present[:8]) + (", ..." if len(present) > 8 else "")
    return f"; {folder} holds {held or 'nothing'}"
