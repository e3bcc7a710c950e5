"""Plain-text tables."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows of text in aligned columns, with the first row as the header.

    Args:
        rows: Equally long rows; the first column is aligned left, the others right.

    Returns:
        The lines, without a newline at the end.

    Example:
        >>> print(table([["kernel", "rank"], ["a", "8"]]))
        kernel  rank
        ------  ----
        a          8
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [rows[0], ["-" * width for width in widths], *rows[1:]]
    ]
    return "\n".join(lines)
