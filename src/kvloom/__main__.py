"""`python -m kvloom` is the `kvloom` command. SIGTERM ends it at any time after the start."""

from typing import NoReturn

from kvloom.cli.termination import end_on_sigterm


def main() -> NoReturn:
    """Run the `kvloom` command with the process's arguments and exit with its status."""
    end_on_sigterm()
    from kvloom.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
