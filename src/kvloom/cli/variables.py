"""Environment variables of flags: finds misspelt ones, so that no setting is ignored silently."""

import difflib
from collections.abc import Iterable

from kvloom.cli.command import Group

PREFIX = "KVLOOM_"


def misspelt_variables(environment: Iterable[str], cli: Group) -> list[str]:
    """Return a warning for each variable of `environment` whose name is nearly, but not quite, that of a flag."""
    flags = {flag for _, command in cli.leaves() for flag in command.flags}
    known = sorted(flag.upper().replace("-", "_") for flag in flags)
    warnings = []
    for variable in sorted(environment):
        name = variable.removeprefix(PREFIX)
        if variable.startswith(PREFIX) and name not in known:
            for close in difflib.get_close_matches(name, known, n=1, cutoff=0.8):
                warnings.append(f"{variable} is not a setting of kvloom and is ignored; did you mean {PREFIX}{close}?")
    return warnings
