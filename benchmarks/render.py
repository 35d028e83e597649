"""Render README.md, and its plots, from page.md and the results.

    python benchmarks/render.py

In page.md ``{result > table > row > column}`` is a number of results/result.json: the
mean over seeds, or with ``±`` behind the column its standard error, too. A row is named
by its labels, with semicolons between them; ``row - row`` or ``column - column`` is a
difference with its 95 % interval. ``{result > table}``, alone on a line, is the table,
``{result > table > column; column}`` a part of it. ``{files}`` is a list of all results
and commands, ``{claims}`` the table of verdicts, and ``{claims > holds}`` how many of
them say so.
"""

import pathlib
import re

import plots
from common import claims, results, tables

FOLDER = pathlib.Path(__file__).parent
REFERENCE = re.compile(r"\{([^{}]+)\}")


def page(found, template):
    """Return the text of README.md."""

    def insert(match):
        return resolve(found, [part.strip() for part in match[1].split(">")])

    return REFERENCE.sub(insert, template)


def resolve(found, parts):
    """Return the text of a reference."""
    match parts:
        case ["claims"]:
            rows = list(claims.judged(found, claims.load()))
            return tables.markdown({"digits": {}, "rows": rows}).rstrip()
        case ["claims", verdict]:
            rows = claims.judged(found, claims.load())
            return str(sum(row["verdict"].startswith(verdict) for row in rows))
        case ["files"]:
            return tables.markdown({"digits": {}, "rows": list(files(found))}).rstrip()
        case [name, table]:
            return tables.markdown(look_up(found, name, table)).rstrip()
        case [name, table, columns]:
            columns = [column.strip() for column in columns.split(";")]
            return tables.markdown(look_up(found, name, table), columns).rstrip()
        case [name, table, row, column] if " - " in row + column:
            table = look_up(found, name, table)
            rows, columns = row.split(" - "), column.split(" - ")
            pair = [
                tables.find_row(table["rows"], row)[column]
                for row in rows
                for column in columns
            ]
            digits = tables.digits_of(columns[0], table)
            interval = claims.difference(*pair, claims.runs(found[name]), digits)
            return claims.text(interval, digits)
        case [name, table, row, column]:
            table = look_up(found, name, table)
            whole, column = column.endswith("±"), column.rstrip("± ")
            value = tables.find_row(table["rows"], row)[column]
            value = value if whole else tables.mean(value)
            return tables.cell(value, tables.digits_of(column, table))
    raise ValueError(f"{{{' > '.join(parts)}}} is no reference.")


def look_up(found, name, table):
    """Return a table, or say which there are."""
    if name not in found:
        raise KeyError(f"No result has the name {name!r}: {', '.join(found)}.")
    if table not in found[name]["tables"]:
        raise KeyError(f"{name} has no {table!r}: {', '.join(found[name]['tables'])}.")
    return found[name]["tables"][table]


def files(found):
    """Yield a record of each result: what measured it, when and where."""
    for name, result in found.items():
        machine, minutes = result["environment"], result["minutes"]
        kept = "its run" if result["source"] == "run" else "a printed table"
        yield {
            "data": f"[{name}](results/{name}.json)",
            "command": f"`{result['command'].removeprefix('python benchmarks/')}`",
            "on": f"{machine['device']}, jax {machine['jax']}",
            "date": result["date"],
            "minutes": minutes and round(minutes),
            "from": kept,
        }


def main():
    """Write the page and draw its plots."""
    found = results.load()
    text = page(found, (FOLDER / "page.md").read_text())
    (FOLDER / "README.md").write_text(text)
    plots.draw_all(found, FOLDER / "plots")


if __name__ == "__main__":
    main()
