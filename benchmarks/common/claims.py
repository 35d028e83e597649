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
from typing import NamedTuple

from scipy import stats

from common import tables

FILE = pathlib.Path(__file__).parent.parent / "claims.toml"
SIGN = {"lower": -1, "higher": 1}  # what is better
HOLDS, FAILS, OPEN = "holds", "does not hold", "can't be told"


class Gain(NamedTuple):
    """A difference in favour of a claim, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def __rmul__(self, sign):
        """Return the same difference, or that of the other from ours."""
        value, *ends = (sign * x for x in self)
        return Gain(value, *sorted(ends))


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
        interval = SIGN[compared["better"]] * gain(ours, other, count, digits)
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
    """Write a Gain."""
    value, low, high = (tables.number(x, digits) for x in interval)
    return f"{value} ({low} to {high})"


def gain(ours, other, count, digits=None):
    """Return the Gain of `ours` over `other`, each a list over seeds or mean and error.

    `count` runs are behind a mean and its error, which are printed with so many
    `digits`. Where `ours` is a difference already, it is the gain.
    """
    if isinstance(ours, dict) and "difference" in ours:
        return Gain(ours["difference"], ours["low"], ours["high"])
    if isinstance(ours, list) and isinstance(other, list):
        if None in ours + other:
            return Gain(math.nan, math.nan, math.nan)
        differences = [a - b for a, b in zip(ours, other, strict=True)]
        count, bias = len(differences), 0.0
        difference, error = tables.mean_and_error(differences)
    else:
        mean, error = tables.mean_and_error(ours)
        its_mean, its_error = tables.mean_and_error(other)
        difference = mean - its_mean
        rounding = 0.0 if digits is None else 0.5 * 10.0**-digits
        error = math.hypot(error + rounding, its_error + rounding)
        bias = 2 * rounding
    half = float(stats.t.ppf(0.975, count - 1)) * error + bias
    return Gain(difference, difference - half, difference + half)


def verdict(gained, margin=0.0):
    """Say whether a claim holds, by the interval of what it gains."""
    if gained.low > -margin:
        return HOLDS
    return FAILS if gained.high < -margin else OPEN


def below(value, limit):
    """Say whether a cost is at most `limit`: a number, or a median with quartiles."""
    if isinstance(value, dict):
        low, high = value["low"], value["high"]
    else:
        low = high = value
    if high <= limit:
        return HOLDS
    return FAILS if low > limit else OPEN
