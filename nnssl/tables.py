"""Tables as lines of text, for a terminal or a log."""

from collections.abc import Collection, Sequence

from tabulate import tabulate


def align(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Return rows of cells as lines with aligned columns, two spaces apart.

    Args:
        rows: Rows of equal length, including the header.
        left: Indices of the columns that are aligned to the left; the others hold numbers and are aligned to the right.
    """
    sides = ["left" if column in left else "right" for column in range(len(rows[0]))]
    table = tabulate(rows, tablefmt="plain", colalign=sides, disable_numparse=True)
    return [line.rstrip() for line in table.splitlines()]


def number(value: float | None, digits: int) -> str:
    """Return a number with the given number of decimals; ``-`` for None."""
    return "-" if value is None else f"{value:.{digits}f}"
