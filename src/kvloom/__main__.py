"""`python -m kvloom` is the `kvloom` command. SIGTERM ends it at any time after the start."""

from __future__ import annotations

from kvloom.cli.termination import TERMINATED, end_on_sigterm, leave

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> NoReturn:
    """Run the `kvloom` command with the process's arguments and exit with its status."""
    end_on_sigterm()
    try:
        from kvloom.cli.main import main as run

        run()
    except SystemExit as end:
        if end.code == TERMINATED:
            leave()
        raise


if __name__ == "__main__":
    main()
