"""The Python blocks of a Markdown page, run as a reader would."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent


def blocks(page):
    """The code of each section, by its heading; "" is what precedes the first."""
    text = (ROOT / "docs" / page).read_text()
    parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    sections = dict(zip(["", *parts[1::2]], parts[::2], strict=True))
    return {
        name: re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        for name, section in sections.items()
    }


def run(page, *sections):
    """Execute these sections after the page's first; return what they have defined."""
    namespace = {"__name__": "recipe"}
    for name in ("", *sections):
        for code in blocks(page)[name]:
            exec(compile(code, f"{page}: {name}", "exec"), namespace)
    return namespace
