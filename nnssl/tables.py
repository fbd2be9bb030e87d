"""Tables as lines of text, and the numbers in them, for a terminal or a log."""

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


def points(value: float | None) -> str:
    """Return a value from 0 to 1 in points from 0 to 100 (``72.3`` for ``0.7234``); ``-`` for None."""
    return "-" if value is None else f"{100 * value + 0.0:.1f}".replace("-0.0", "0.0")


def signed_points(value: float | None) -> str:
    """Return a difference in points with its sign (``+9.3``, ``-0.5``, ``0.0``); ``-`` for None."""
    text = points(value)
    return f"+{text}" if value is not None and float(text) > 0 else text
