"""``diagd doctor``: is this machine ready, and what to do where it is not."""

from __future__ import annotations

from dataclasses import asdict

from diagd.bundle.cache import clear
from diagd.cli import terminal
from diagd.cli.options import Verb
from diagd.options import File, checked, flag, positional
from diagd.profiling.doctor import PROBLEM, check_bundle, check_machine

EXAMPLES = """examples:
  diagd doctor
  diagd doctor crafter-3m.diagd
  diagd doctor --json
  diagd doctor --clear-cache

Exit code 1 where something is wrong; what is only absent costs the features that need it.
"""

COLOURS = {"ok": "green", "problem": "red", "absent": "yellow"}


@checked
class DoctorOptions:
    """What to check."""

    bundle: File | None = positional("also check this bundle", None)
    clear_cache: bool = flag("empty this machine's cache first", False)
    json: bool = flag("machine-readable", False)


def run(options: DoctorOptions) -> int:
    """Print the checks; exit code 1 where one found a problem."""
    if options.clear_cache:
        clear()
    checks = check_machine()
    if options.bundle:
        checks += check_bundle(options.bundle)
    problems = sum(check.status == PROBLEM for check in checks)
    if options.json:
        terminal.print_json([asdict(check) for check in checks])
    else:
        rows = (
            (check.name, terminal.styled(check.status, COLOURS[check.status]), check.found, check.fix)
            for check in checks
        )
        terminal.print_table(terminal.console(), ("check", "", "found", "how to fix"), rows)
    return 1 if problems else 0


VERB = Verb(DoctorOptions, run, EXAMPLES, prints=True)
