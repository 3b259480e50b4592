"""Tables on the terminal: aligned columns, folded to the terminal's width where that is known."""

import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest

LEAST = 12
"""Fewest characters to which a column is folded."""

GAP = 2
"""Blanks between columns."""


def terminal_width() -> int | None:
    """Return the columns of the terminal that standard output is, or None for a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: bool = False, indent: int = 0) -> Iterator[str]:
    """Yield the lines of a table with aligned columns, all but the first to the right when asked; `indent` in blanks.

    On a terminal the widest columns are folded, so that a row may take several lines and none is longer than the
    terminal, as long as every column keeps `LEAST` characters. Tables for files and pipes are never folded.
    """
    lines = [list(header), *[list(row) for row in rows]]
    columns = terminal_width()
    most = None if columns is None else columns - indent
    widths = _fitting([max(len(line[i]) for line in lines) for i in range(len(header))], most)
    for line in lines:
        for cells in zip_longest(*map(_folded, line, widths), fillvalue=""):
            pairs = enumerate(zip(cells, widths, strict=True))
            shown = (cell.rjust(w) if right and i else cell.ljust(w) for i, (cell, w) in pairs)
            yield (" " * indent + (" " * GAP).join(shown)).rstrip()


def _fitting(widths: list[int], most: int | None) -> list[int]:
    """Return the widths of columns with the widest made narrower until the table has at most `most` characters."""
    found = list(widths)
    while most is not None and (excess := sum(found) + GAP * (len(found) - 1) - most) > 0:
        widest = max(range(len(found)), key=found.__getitem__)
        if found[widest] <= LEAST:
            break
        narrower = (width for width in found if width < found[widest])
        found[widest] = max([LEAST, found[widest] - excess, *narrower])
    return found


def _folded(cell: str, width: int) -> list[str]:
    """Return the lines of a cell, at blanks where there are any."""
    return [cell] if len(cell) <= width else textwrap.wrap(cell, width, break_on_hyphens=False)
