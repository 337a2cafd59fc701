"""Options of verbs: what is a flag, what stands behind ``--set``, and what is said of mistakes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from diagd.cli.main import main
from diagd.cli.options import Verb, add_options, entries, explain_stray, parse_options, read_options
from diagd.cli.verbs import VERBS
from diagd.errors import UsageError
from diagd.options import File, Flag, Numbers, checked, flag, positional, setting
from diagd.schedule import RowSeed


@checked
class Engine:
    threads: int = setting("CPU threads", 0, ge=0)
    frames: int = setting("of the window", 4)
    hidden: bool = True


@checked
class Options:
    source: File = positional("what is read")
    seed: RowSeed = flag("of rows", RowSeed.PREVIOUS_FRAME)
    k: Numbers = flag("row lags", (1, 2))
    order: tuple[str, ...] = flag("of decoding", (), Flag(count="+"))
    force: bool = flag("all the same", False)
    frames: int = setting("of the clip", 1, ge=1)
    share: float | None = setting("of windows", None)
    engine: Engine = Engine()


def read(*words: str) -> Options:
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, Options)
    return read_options(Options, parser.parse_args(words))


def test_what_is_not_said_is_the_default() -> None:
    assert read("a") == Options(source=Path("a"))


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("--threads", "--threads is no flag: give --set threads=VALUE"),
        ("--threads=2", "--threads=2 is no flag: give --set threads=VALUE"),
        ("--oder", "unknown option '--oder'; did you mean '--order'? (known: --force, --k, --order, --seed)"),
        ("b", "unknown option 'b' (known: --force, --k, --order, --seed)"),
    ],
)
def test_what_is_no_option_is_told_what_is(word: str, told: str) -> None:
    assert explain_stray(Options, word) == told


def test_the_verb_tells_of_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    tasks = ["world", "train", "out", "--data", "in", "--processes", "1"]
    for words in (["generat"], tasks, ["play", "--seed", "1"]):
        with pytest.raises(SystemExit) as left:
            main(words)
        assert left.value.code == 2
    told = capsys.readouterr().err
    assert "diagd: error: unknown verb 'generat'; did you mean 'generate'?" in told
    assert "diagd play: error: unknown option '--seed'" in told


def test_flags_and_settings_are_typed() -> None:
    words = ("--k", "3,4", "--order", "k=1 chained", "next token", "--force", "--seed", "above")
    found = read("a", *words, "--set", "threads=2", "--set", "share=0.5", "--set", "engine.frames=7")
    assert found == Options(
        source=Path("a"),
        seed=RowSeed.ABOVE,
        k=(3, 4),
        order=("k=1 chained", "next token"),
        force=True,
        share=0.5,
        engine=Engine(threads=2, frames=7),
    )


def test_help_shows_values_as_they_are_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "of rows: previous_frame, above, duplicate, prompt (default previous_frame)" in shown
    assert "RowSeed" not in shown
    assert "row lags (default 1,2)" in shown
    assert "engine.frames: of the window (default 4)" in shown
    assert "threads: CPU threads" in shown
    assert "hidden" not in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("",), "SOURCE : the path is empty"),
        (("a\0b",), "no path holds a null character"),
        (("a", "--k", "x"), "--k x: expected whole numbers such as 1,2,4"),
        (("a", "--seed", "abov"), "--seed abov: unknown seed 'abov'; did you mean 'above'?"),
        (("a", "--set", "threads=-1"), "--set threads=-1: Input should be greater than or equal to 0"),
        (("a", "--set", "engine.frames=x"), "--set engine.frames=x: Input should be a valid integer"),
        (("a", "--set", "share=nan"), "--set share=nan: Input should be a finite number"),
        (("a", "--set", "share=inf"), "--set share=inf: Input should be a finite number"),
        (("a", "--set", "thread=1"), "did you mean 'threads'?"),
        (("a", "--set", "seed=above"), "unknown option of --set 'seed': it is no setting, give --seed"),
        (("a", "--set", "hidden=0"), "unknown option of --set 'hidden'"),
        (("a", "--set", "threads"), "--set takes NAME=VALUE, got 'threads'"),
        (("a", "--k", " "), "--k  : the value is empty"),
        (("a", "--set", "threads= "), "--set threads: the value is empty"),
    ],
)
def test_mistakes_are_told_where_they_were_made(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError) as told:
        read(*words)
    assert message in str(told.value)


def test_the_home_that_a_shell_left_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert read("~/a.mp4").source == Path("/home/somebody/a.mp4")
    assert [read(word).source for word in ("~a.mp4", "a~/b")] == [Path("~a.mp4"), Path("a~/b")]


def test_a_library_call_needs_no_command_line() -> None:
    assert parse_options(Options, ["frames=3"], {("source",): "a"}).frames == 3


def verbs() -> Iterator[tuple[str, Verb[object]]]:
    for name in VERBS:
        found = import_module(f"diagd.cli.{name}").VERB
        yield from ((name, found),) if isinstance(found, Verb) else found.items()
    for name in ("eval", "world"):
        found = import_module(f"worlds.cli.{name}").VERB
        yield from ((name, found),) if isinstance(found, Verb) else found.items()


@pytest.mark.parametrize(("name", "verb"), verbs())
def test_a_verb_has_eight_flags_at_most(name: str, verb: Verb[object]) -> None:
    flags = [entry for entry in entries(verb.options) if entry.flag and not entry.flag.positional]
    assert len(flags) <= 8, [entry.name for entry in flags]
    assert verb.examples.lstrip().startswith("example"), name
