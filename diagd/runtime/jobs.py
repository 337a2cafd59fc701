"""Which files are made, from which clips: one, its futures, or those of a folder or of a list."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from diagd.bundle.targets import check_apart, file_target
from diagd.errors import UsageError
from diagd.runtime.clip import ClipOptions
from diagd.runtime.episodes import EPISODE
from diagd.runtime.options import GenerateOptions, TextOptions
from diagd.runtime.pictures import files_in
from diagd.runtime.video import OUTPUTS

LINES = ".jsonl"
"""Of the file of actions beside what the model played."""

KINDS = (*OUTPUTS, EPISODE)
"""Of files that can be made."""

CLIPS = (".mp4", EPISODE, ".avi", ".mkv", ".mov", ".webm")
"""Files of which a folder is many clips, not the pictures of one."""


@dataclass(frozen=True)
class Job:
    """One prompt and the files of its futures; ``skips`` those that are there."""

    clip: ClipOptions
    condition: TextOptions
    outputs: tuple[Path, ...]
    skips: bool = False

    def todo(self) -> list[tuple[int, Path]]:
        """The futures that are made, by number."""
        return [(n, path) for n, path in enumerate(self.outputs) if not (self.skips and path.exists())]

    def check(self, taken: set[Path]) -> None:
        """Refuse to write over what is read, what is no such file, or what another job writes.

        ``taken`` are outputs of the jobs before, to which these are added.

        Raises:
            UsageError: an output is one of them.
        """
        clip, text = self.clip, self.condition.text
        for output in self.outputs:
            file_target(output, KINDS)
            check_apart(output, {"--prompt": clip.prompt, "--actions": clip.lines_file, "--set text": text})
            if clip.acts and output.suffix.lower() != EPISODE and not (self.skips and output.exists()):
                self._check_lines(output)
            if output in taken:
                raise UsageError(f"{clip.prompt} and another clip would both be {output}; rename one of them")
            taken.add(output)

    def _check_lines(self, output: Path) -> None:
        """Refuse to write the actions of an output over a file, which nobody named."""
        lines = output.with_suffix(LINES)
        if lines.exists():
            raise UsageError(
                f"the model's actions would go to {lines}, which is there already; give another --output, or "
                "remove it yourself"
            )
        file_target(lines, (LINES,))


def jobs_of(options: GenerateOptions) -> list[Job]:
    """What is to be made; no output can be refused later."""
    prompt, output = options.clip.prompt, options.output
    if prompt.suffix.lower() == ".jsonl":
        many = _listed(options)
    elif prompt.is_dir() and (found := files_in(prompt, CLIPS)):
        many = [(path.stem, _beside(options.clip, path), options.condition) for path in found]
    else:
        job = Job(options.clip, options.condition, _futures(output, options.branches))
        job.check(set())
        return [job]
    if output.suffix.lower() in KINDS or (output.exists() and not output.is_dir()):
        raise UsageError(f"--output {output}: {len(many)} clips go to a folder; name one")
    output.mkdir(parents=True, exist_ok=True)
    jobs = [
        Job(clip, condition, _futures(output / f"{name}{options.kind}", options.branches), skips=True)
        for name, clip, condition in many
    ]
    taken: set[Path] = set()
    for job in jobs:
        job.check(taken)
    return jobs


def _futures(output: Path, branches: int) -> tuple[Path, ...]:
    if branches == 1:
        return (output,)
    return tuple(output.with_name(f"{output.stem}-{n}{output.suffix}") for n in range(branches))


def _beside(clip: ClipOptions, path: Path) -> ClipOptions:
    """One clip of a folder, with the lines that have its name."""
    lines = path.with_suffix(".jsonl")
    return replace(clip, prompt=path, actions=lines if lines.exists() else clip.actions)


def _listed(options: GenerateOptions) -> list[tuple[str, ClipOptions, TextOptions]]:
    """Clips of a file of lines ``{"visual_input": file, "prompt": words, "actions": file}``, by name."""
    listing, found = options.clip.prompt, []
    try:
        lines = listing.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read clips from {listing}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            clip, condition = _entry(line, options)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(
                f'{listing}, line {number}: expected {{"visual_input": file, "prompt": words, "actions": '
                f"file}}, the last two where the model takes them ({error})"
            ) from error
        found.append((f"{number:04d}-{clip.prompt.stem}", clip, condition))
    if not found:
        raise UsageError(f'{listing} lists no clip; write {{"visual_input": file}} on a line')
    return found


def _entry(line: str, options: GenerateOptions) -> tuple[ClipOptions, TextOptions]:
    entry, folder = json.loads(line), options.clip.prompt.parent
    path, actions, words = folder / entry["visual_input"], entry.get("actions"), entry.get("prompt")
    if not isinstance(words, str | None) or "\0" in f"{path}{actions}":
        raise ValueError("names and words are text")
    clip = _beside(options.clip, path)
    clip = replace(clip, actions=folder / actions) if actions else clip
    return clip, replace(options.condition, words=words) if words else options.condition
