"""What is left when a verb is killed, when processes race on a cold cache, and when the disk is full.

``kill``: each verb is killed (SIGKILL) at random moments of its work, again and again in one folder: what was
there before must stay whole or be the whole new result, and the run that follows must leave nothing else.
``race``: processes start together on an empty cache, round after round: all must give the same tokens.
``full``: each verb on disks that hold fewer bytes, and fewer files, than it needs (tmpfs; needs root): one
line, exit code 2, what was there before unharmed; with room again, the verb works and leaves nothing else.

The small world of the tests stands in for a model. From the root:

    python -m benchmarks.faults --part kill --kills 50
    python -m benchmarks.faults --part race --processes 20 --rounds 20
    python -m benchmarks.faults --part full
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from benchmarks import CONSOLE, parser
from diagd.bundle import Bundle
from diagd.bundle.files import is_unfinished
from diagd.cli.main import main as diagd
from diagd.progress import Progress
from diagd.runtime.video import VideoWriter
from diagd.web.folder import runtime_files
from tests.worlds import random_world

RESULTS = {
    "export": "out.diagd",
    "calibrate": "out.diagd",
    "build": "out.diagd",
    "generate": "out.mp4",
    "encode": "out.npy",
    "decode": "out.mp4",
    "web": "page",
}
"""Of each verb, what it writes."""


@dataclass(frozen=True)
class Place:
    """A folder with what a user has: a trained world, two bundles of it, a prompt and actions."""

    folder: Path

    @property
    def bundle(self) -> Path:
        """A bundle of the prefix and the modern form."""
        return self.folder / "base.diagd"

    def command(self, verb: str, work: Path) -> list[str]:
        bundle, prompt = work / "out.diagd", self.folder / "prompt.gif"
        fewer = "--precision=int8-weight", "--budget=none", "--set=steps=64"
        words: dict[str, list[str | Path]] = {
            "export": ["--model=world", "--checkpoint", self.folder / "trained", "--output", bundle],
            "calibrate": [bundle, *fewer, "--data", prompt],
            "build": [bundle, "--target=sm86", "--runtime=tensorrt_rtx", "--widths=16"],
            "generate": [self.bundle, "--prompt", prompt, f"--actions={self.folder / 'walk.jsonl'}"],
        }
        words["encode"] = [self.bundle, self.folder / "clip.mp4"]
        words["decode"] = [self.bundle, self.folder / "clip.npy"]
        words["web"] = [self.bundle, f"--runtime={self.folder / 'runtime'}"]
        if verb in ("generate", "encode", "decode", "web"):
            words[verb] += ["--output", work / RESULTS[verb]]
        return [verb, *map(str, words[verb])]

    def prepare(self, verb: str, work: Path) -> None:
        """Put what the verb changes into ``work``."""
        if verb in ("calibrate", "build"):
            shutil.copytree(self.bundle, work / "out.diagd")
            (work / "out.diagd" / "NOTES.txt").write_text("measured on the train")


def check(verb: str, work: Path) -> str | None:
    """What is wrong with the results in ``work``; None: they are as before, or whole and new."""
    bundle, video, tokens, page = (work / name for name in ("out.diagd", "out.mp4", "out.npy", "page"))
    try:
        if bundle.exists():
            Bundle.open(bundle)
        if video.exists() and video.read_bytes()[4:8] != b"ftyp":
            return "the video is cut"
        if tokens.exists():
            np.load(tokens)
        if page.exists():
            sizes = json.loads((page / "world.json").read_bytes())["files"]
            cut = [name for name, size in sizes.items() if (page / name).stat().st_size != size]
            return f"{cut} of the page are cut" if cut else None
    except Exception as error:
        return str(error)
    notes = bundle / "NOTES.txt"
    if verb in ("calibrate", "build") and not (notes.exists() and notes.read_text()):
        return "a file of the user is gone"
    return None


def litter(work: Path) -> list[str]:
    """What lies about in ``work``, the results' folders included."""
    return [path.name for path in work.rglob("*") if path.name.startswith(".") or is_unfinished(path.name)]


def child(words: list[str], cache: Path | None = None) -> int:
    """Start a verb in a process of its own, which has imported what verbs need; returns its number."""
    if process := os.fork():
        return process
    code = 70
    with contextlib.suppress(BaseException):
        if cache is not None:
            os.environ["DIAGD_CACHE"] = str(cache)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(os.open(_errors(os.getpid()), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        code = diagd(words)
    os._exit(code)


def finish(process: int) -> int:
    """The exit code of a child; that of a killed one is negative."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def said(process: int) -> str:
    return _errors(process).read_text(errors="replace").strip()


def _errors(process: int) -> Path:
    return Path(os.environ["DIAGD_SAID"]) / str(process)


def run(words: list[str]) -> None:
    if code := finish(process := child(words)):
        sys.exit(f"{' '.join(words)}: exit {code}: {said(process)}")


def kill_part(place: Place, verbs: list[str], kills: int) -> Table:
    table = Table(
        "verb", "seconds", "killed at work", "finished first", "damaged", "left over", title="kill -9"
    )
    moments = random.Random(0)
    for verb in verbs:
        with workspace(place, verb) as work:
            command = place.command(verb, work)
            began = time.monotonic()
            run(command)
            took = time.monotonic() - began
            killed = finished = 0
            damaged: list[str] = []
            while killed < kills:
                reset(place, verb, work)
                process = child(command)
                time.sleep(moments.uniform(0, took))
                os.kill(process, signal.SIGKILL)
                code = finish(process)
                killed, finished = killed + (code == -signal.SIGKILL), finished + (code == 0)
                damaged += filter(None, [check(verb, work)])
            reset(place, verb, work)
            run(command)
            left = litter(work)
        wrong = "; ".join(damaged[:2]) or "0"
        cells = f"{took:.1f}", str(killed), str(finished), wrong, str(left or "nothing")
        table.add_row(verb, *cells)
        CONSOLE.print(verb, *cells)
    return table


def reset(place: Place, verb: str, work: Path) -> None:
    """Undo a result that stands in the way of the next run, as a user would."""
    bundle = work / "out.diagd"
    if verb == "build":
        shutil.rmtree(bundle / "engines", ignore_errors=True) if not litter(work) else None
    if verb == "calibrate" and any(
        graph.precision != "fp32" for graph in Bundle.open(bundle).manifest.graphs
    ):
        shutil.rmtree(bundle)
        place.prepare(verb, work)


@contextlib.contextmanager
def workspace(place: Place, verb: str) -> Iterator[Path]:
    """A folder for a verb's results, filled with what it changes."""
    with tempfile.TemporaryDirectory() as name:
        place.prepare(verb, Path(name))
        yield Path(name)


def race_part(place: Place, processes: int, rounds: int) -> Table:
    table = Table(
        "processes", "rounds", "runs", "failed", "other tokens", "seconds a round", title="cold cache"
    )
    failed: list[str] = []
    other = 0
    began = time.monotonic()
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            work = Path(name)
            outputs = [work / f"{n}.npy" for n in range(processes)]
            command = place.command("generate", work)[:-1]
            started = [child([*command, str(output)], work / "cache") for output in outputs]
            failed += [f"{code}: {said(process)}" for process in started if (code := finish(process))]
            tokens = [np.load(output).tobytes() for output in outputs if output.exists()]
            other += sum(one != tokens[0] for one in tokens)
    seconds = (time.monotonic() - began) / rounds
    wrong = f"{len(failed)} {failed[:2]}" if failed else "0"
    table.add_row(str(processes), str(rounds), str(processes * rounds), wrong, str(other), f"{seconds:.1f}")
    return table


@contextlib.contextmanager
def disk(folder: Path, limit: str) -> Iterator[Path]:
    """A disk in memory with a limit, such as ``size=1m`` or ``nr_inodes=9``."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", limit, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def full_part(place: Place, verbs: list[str], steps: int) -> Table:
    """Run each verb on disks of every size below what it needs."""
    table = Table("verb", "disks", "refused in a line", "worked", "wrong", title="full disks")
    for verb in verbs:
        wrong: list[str] = []
        refused = worked = 0
        for limit in limits(place, verb, steps):
            with disk(place.folder / "disk", limit) as small:
                try:
                    place.prepare(verb, small)
                except (OSError, shutil.Error):
                    continue  # too small for what was there before
                code = finish(process := child(place.command(verb, small)))
                lines = [line for line in said(process).splitlines() if line.startswith("error: ")]
                refused, worked = refused + (code == 2 and len(lines) == 1), worked + (code == 0)
                if code not in (0, 2) or (code == 2 and len(lines) != 1):
                    wrong.append(f"{limit}: exit {code}: {said(process)[-200:]}")
                wrong += [f"{limit}: {problem}" for problem in filter(None, [check(verb, small)])]
                if code:
                    room = "remount,size=200m,nr_inodes=10000"
                    subprocess.run(["mount", "-o", room, str(small)], check=True)
                    if finish(process := child(place.command(verb, small))) or litter(small):
                        wrong.append(f"{limit}: with room again: {said(process)[-200:]} {litter(small)}")
        table.add_row(verb, str(refused + worked), str(refused), str(worked), "; ".join(wrong[:2]) or "0")
        CONSOLE.print(verb, refused, worked, wrong)
    return table


def limits(place: Place, verb: str, steps: int) -> list[str]:
    """Limits from what is there before to a little above what a verb needs, in bytes and in files."""
    most = 0
    with workspace(place, verb) as work:
        before = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
        files = len(list(work.rglob("*")))
        process = child(place.command(verb, work))
        while os.waitpid(process, os.WNOHANG) == (0, 0):
            with contextlib.suppress(OSError):
                most = max(most, sum(path.stat().st_size for path in work.rglob("*") if path.is_file()))
            time.sleep(0.01)
    sizes = [before + (most - before) * step // steps + 4096 for step in range(steps + 1)]
    return [f"size={size}" for size in sizes] + [f"nr_inodes={files + 1 + n}" for n in range(steps + 1)]


PARTS: dict[str, Callable[[Place, argparse.Namespace], Table]] = {
    "kill": lambda place, args: kill_part(place, args.verb or list(RESULTS), args.kills),
    "race": lambda place, args: race_part(place, args.processes, args.rounds),
    "full": lambda place, args: full_part(place, args.verb or list(RESULTS), args.steps),
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--part", choices=tuple(PARTS), action="append")
    options.add_argument(
        "--verb", choices=tuple(RESULTS), action="append", help="of kill and full; default: all"
    )
    options.add_argument("--kills", type=int, default=50, help="of each verb")
    options.add_argument("--processes", type=int, default=20)
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--steps", type=int, default=6, help="full disks of each kind")
    args = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        place = Place(Path(name))
        os.environ |= {"DIAGD_CACHE": f"{name}/cache", "DIAGD_SAID": f"{name}/said"}
        Path(os.environ["DIAGD_SAID"]).mkdir()
        random_world(place.folder / "trained")
        with VideoWriter(place.folder / "prompt.gif", 10, (36, 48)) as video:
            video.write(np.random.default_rng(0).integers(0, 256, (36, 48, 3), dtype=np.uint8))
        (place.folder / "walk.jsonl").write_text('{"action": "left", "repeat": 4}\n')
        base = ["--model=world", f"--checkpoint={place.folder / 'trained'}", "--form=prefix,modern"]
        run(["export", *base, f"--output={place.bundle}"])
        with VideoWriter(place.folder / "clip.mp4", 10, (36, 48)) as video:
            video.write(np.random.default_rng(0).integers(0, 256, (99, 36, 48, 3), dtype=np.uint8))
        run(
            [
                "encode",
                str(place.bundle),
                str(place.folder / "clip.mp4"),
                f"--output={place.folder / 'clip.npy'}",
            ]
        )
        (place.folder / "runtime").mkdir()
        for file, content in runtime_files(None, Progress()).items():
            (place.folder / "runtime" / file).write_bytes(content)
        for part in args.part or PARTS:
            CONSOLE.print(PARTS[part](place, args))


if __name__ == "__main__":
    main()
