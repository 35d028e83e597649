"""Run the Python of a README, in an environment that has the package alone.

python tests/run_readme.py README.md
"""

import pathlib
import re
import sys


def main(page):
    """Run all blocks, one after the other, and say which package they had."""
    namespace = {}
    text = pathlib.Path(page).read_text()
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, page, "exec"), namespace)
    print(namespace["ivon_jax"].__file__, namespace["ivon_jax"].__version__)


if __name__ == "__main__":
    main(*sys.argv[1:])
