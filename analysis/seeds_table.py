"""What many seeds became, as a table: a line a seed, those that missed their target or failed among them.

A row is a dict of seeds.py's `row_of`.
"""

import statistics


def cells(row):
    """A row of the table, as words."""
    if row["failed"]:
        return [str(row["seed"]), "FAILED", "-", "-", "-", "-", "-", row["failed"][:100]]
    parent = "-" if row["parent_loss"] is None else f"{row['parent_loss']:.4f}"
    if row["parent_steps"] is not None:
        parent += f" ({row['parent_steps']} steps)"
    correct = "-" if row["correct"] is None else f"{row['correct']:,} of {row['examples']:,}"
    seconds = ["-" if value is None else f"{value:.0f}" for value in row["seconds"].values()]
    return [
        str(row["seed"]),
        "met" if row["met"] else "MISSED",
        parent,
        f"{row['open']:.2f} of {row['total']}",
        correct,
        *seconds,
        row["closest"] or "",
    ]


def table(rows):
    """The rows as text, one line a seed."""
    lines = [
        [
            "seed",
            "target",
            "parent's loss",
            "open edges",
            "right",
            "s dense",
            "s sparse",
            "closest",
        ],
        *map(cells, rows),
    ]
    return aligned(lines)


def aligned(lines):
    """Lists of cells as lines of text, column by column."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
    )


def spread(values):
    """{min, median, max} of some numbers, or None of none."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)} if values else None


def summary(rows):
    """What all seeds say together: {met, of, open (of those that met), seconds (training, of those that came
    to an end)}.
    """
    ended = [row for row in rows if not row["failed"]]
    return {
        "met": sum(row["met"] for row in rows),
        "of": len(rows),
        "open": spread([row["open"] for row in ended if row["met"]]),
        "seconds": spread([sum(value or 0 for value in row["seconds"].values()) for row in ended]),
    }


def in_words(found):
    """The line below the table. found: `summary`'s."""
    words = [f"met {found['met']} of {found['of']}"]
    for key, what, form in (
        ("open", "open edges of those", ".2f"),
        ("seconds", "seconds of training", ".0f"),
    ):
        if found[key]:
            numbers = ", ".join(f"{name} {value:{form}}" for name, value in found[key].items())
            words.append(f"{what}: {numbers}")
    return "; ".join(words)
