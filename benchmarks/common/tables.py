"""Tables of records as Markdown: one column for each key, cells by what they hold."""

import math
import statistics


def markdown(table, columns=None):
    """Return the lines of `table`, ``{"digits": {column: int}, "rows": [record]}``.

    A list of numbers, one for each seed, is shown as mean ± standard error.
    """
    rows, digits = table["rows"], table["digits"]
    columns = columns or list(dict.fromkeys(key for row in rows for key in row))
    cells = [[cell(row.get(c), digits.get(c)) for c in columns] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


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
        case list():
            mean, error = mean_and_error(value)
        case {"mean": mean, "error": error}:
            pass
        case {"median": median, "low": low, "high": high}:
            middle, *ends = (number(x, digits) for x in (median, low, high))
            return f"{middle} ({'-'.join(ends)})"
        case _:
            return number(value, digits)
    return f"{number(mean, digits)} ± {number(error, digits)}"


def mean(value):
    """Return the number that a cell is about: of seeds their mean."""
    match value:
        case list():
            return math.nan if None in value else statistics.fmean(value)
        case {"mean": middle} | {"median": middle}:
            return middle
        case _:
            return value


def mean_and_error(values):
    """Return the mean over seeds and its standard error, nan where a run diverged."""
    if None in values:
        return math.nan, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), error


def number(value, digits=None):
    """Return a number with so many decimals, or with four significant digits."""
    if value is None:
        return "nan"
    if digits is not None:
        return f"{value:,.{digits}f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
