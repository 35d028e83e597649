"""Tables of records as Markdown: one column for each key, cells by what they hold."""

import math
import statistics


def markdown(table, columns=None):
    """Return the lines of `table`, ``{"digits": {column: int}, "rows": [record]}``.

    A list of numbers, one for each seed, is shown as mean ± standard error.
    """
    rows = table["rows"]
    columns = columns or list(dict.fromkeys(key for row in rows for key in row))
    cells = [[cell(row.get(c), digits_of(c, table)) for c in columns] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def digits_of(column, table):
    """Return a column's decimals; where no one says so, 1 for %, 3 for seeds."""
    seeds = any(isinstance(row.get(column), list) for row in table["rows"])
    default = 1 if column.endswith("%") else 3 if seeds else None
    return table["digits"].get(column, default)


def find_row(rows, labels):
    """Return the one row that has all these labels, with semicolons between them."""
    labels = {label.strip() for label in labels.split(";")}
    found = [row for row in rows if labels <= {cell(v) for v in row.values()}]
    if len(found) != 1:
        raise KeyError(f"{len(found)} rows have the labels {sorted(labels)}.")
    return found[0]


def padded(rows):
    """Return the records with all columns that any of them has."""
    columns = dict.fromkeys(key for row in rows for key in row)
    return [{column: row.get(column) for column in columns} for row in rows]


def record(labels, columns, values):
    """Return a record of labels and of a value for each column."""
    return labels | dict(zip(columns, values, strict=True))


def cell(value, digits=None):
    """Return a value as text."""
    match value:
        case None:
            return ""
        case str():
            return value
        case [only]:
            return number(only, digits)
        case list() | {"mean": _}:
            mean, error = mean_and_error(value)
        case {"median": median, "low": low, "high": high}:
            middle, *ends = (number(x, digits) for x in (median, low, high))
            return f"{middle} ({'-'.join(ends)})"
        case {"difference": middle, "low": low, "high": high}:
            middle, low, high = (number(x, digits) for x in (middle, low, high))
            return f"{middle} ({low} to {high})"
        case _:
            return number(value, digits)
    return f"{number(mean, digits)} ± {number(error, digits)}"


def mean(value):
    """Return the number that a cell is about: of seeds their mean."""
    match value:
        case list():
            return math.nan if None in value else statistics.fmean(value)
        case {"mean": middle} | {"median": middle} | {"difference": middle}:
            return middle
        case _:
            return value


def mean_and_error(value):
    """Return the mean over seeds and its standard error, nan where a run diverged."""
    match value:
        case {"mean": middle, "error": error}:
            return middle, error
        case [only]:
            return only, 0.0
        case list() if None not in value:
            error = statistics.stdev(value) / math.sqrt(len(value))
            return statistics.fmean(value), error
    return math.nan, math.nan


def number(value, digits=None):
    """Return a number with so many decimals, or with four significant digits."""
    if value is None:
        return "nan"
    if digits is not None:
        return f"{value:,.{digits}f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
