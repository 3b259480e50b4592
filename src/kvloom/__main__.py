"""`python -m kvloom` is the `kvloom` command."""

from kvloom.cli.main import main

if __name__ == "__main__":
    main()
