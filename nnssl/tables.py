"""Tables as lines of text, for a terminal or a log."""

from collections.abc import Collection, Sequence


def align(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Return rows of cells as lines whose columns stand below one another, two spaces apart.

    Args:
        rows: all of the same length, the header among them.
        left: columns that are aligned to the left; the others, of numbers, to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def number(value: float | None, digits: int) -> str:
    """Return a number with so many digits after the point; ``-`` for None."""
    return "-" if value is None else f"{value:.{digits}f}"
