"""What the paper claims, and whether our data say so: intervals, then verdicts.

claims.toml lists the claims, and for each what to compare: two cells of results/. The
gain is the difference of the two means, positive where it speaks for the claim, with a
95 % interval:

    a cell is a difference, with interval   that one: it covers test examples, too
    both cells have one value per seed      Student's t of the differences, seed by seed
    a mean and a standard error was kept    Student's t of the two errors together

A verdict says no more than that interval: "holds" where all of it is above zero, "does
not hold" where all of it is below, else "can't be told". Where the claim is "as good
as", zero is replaced by a margin below it. Claims of cost have a limit instead, for
the upper end of what was measured.
"""

import math
import pathlib
import tomllib

import numpy as np
from scipy import stats

from common import tables
from common.intervals import Interval, over_seeds

FILE = pathlib.Path(__file__).parent.parent / "claims.toml"
HOLDS, FAILS, OPEN = "holds", "does not hold", "can't be told"


def load(path=FILE):
    """Return the list of claims."""
    return tomllib.loads(path.read_text())["claim"]


def judged(found, claims):
    """Yield a record for each comparison of each claim, in the results `found`."""
    for claim in claims:
        says = {"claim": claim["says"], "the paper": claim["paper"]}
        for compared in claim["compare"]:
            yield says | judge(found, compared)
            says = {"claim": "", "the paper": ""}


def judge(found, compared):
    """Return the record of one comparison: both cells, the gain and the verdict."""
    result, table = (part.strip() for part in compared["at"].split(">"))
    column, row = compared["column"], compared["row"]
    table = found[result]["tables"][table]
    digits = tables.digits_of(column, table)
    found_row = tables.find_row(table["rows"], row)
    ours = found_row if column == "difference" else found_row[column]
    other, beside, gained = 1.0, [], ""
    shown = f"{row} {tables.cell(ours, digits)}"
    if isinstance(ours, dict) and "difference" in ours:
        shown, beside = "", [row]
    if "than" in compared:
        other = tables.find_row(table["rows"], compared["than"])
        other = other[compared.get("than_column", column)]
        beside.append(f"{compared['than']} {tables.cell(other, digits)}")
    if "limit" in compared:
        beside.append(f"at most {compared['limit']} times")
        said = below(ours, compared["limit"] * other)
    else:
        count = compared.get("seeds") or runs(found[result])
        interval = difference(ours, other, count, digits)
        interval = in_favour(interval, compared["better"])
        margin, gained = compared.get("margin", 0.0), text(interval, digits)
        said = verdict(interval, margin) + (f" within {margin}" if margin else "")
    return {
        "where": f"{compared['on']}, {column}",
        "ours": shown,
        "beside": ", ".join(beside),
        "gain, 95 %": gained,
        "verdict": said,
    }


def runs(result):
    """Return over how many runs a study's means are, if it says so."""
    config = result["config"]
    return config.get("seeds") or config.get("splits")


def text(interval, digits):
    """Write an estimate and its interval."""
    value, low, high = (tables.number(x, digits) for x in interval)
    return f"{value} ({low} to {high})"


def difference(ours, other, count, digits=None):
    """Return the `Interval` of ``ours - other``: lists over seeds, or mean and error.

    `count` runs are behind a mean and its error, which are printed with so many
    `digits`. Where `ours` is a difference already, it is that one.
    """
    if isinstance(ours, dict) and "difference" in ours:
        return Interval(ours["difference"], ours["low"], ours["high"])
    if isinstance(ours, list) and isinstance(other, list):
        ours, other = np.asarray(ours, float), np.asarray(other, float)  # None is NaN
        return over_seeds(ours - other)
    mean, error = tables.mean_and_error(ours)
    its_mean, its_error = tables.mean_and_error(other)
    rounding = 0.0 if digits is None else 0.5 * 10.0**-digits
    error = math.hypot(error + rounding, its_error + rounding)
    radius = float(stats.t.ppf(0.975, count - 1)) * error + 2 * rounding
    return Interval(mean - its_mean, mean - its_mean - radius, mean - its_mean + radius)


def in_favour(interval, better):
    """Return the interval of a gain, where `better` is "lower" or "higher"."""
    if better == "higher":
        return interval
    return Interval(-interval.estimate, -interval.high, -interval.low)


def verdict(interval, margin=0.0):
    """Say whether a claim holds, by the interval of what it gains."""
    if interval.low > -margin:
        return HOLDS
    return FAILS if interval.high < -margin else OPEN


def below(value, limit):
    """Say whether a cost is at most `limit`: a number, or a median with quartiles."""
    if isinstance(value, dict):
        low, high = value["low"], value["high"]
    else:
        low = high = value
    if high <= limit:
        return HOLDS
    return FAILS if low > limit else OPEN
