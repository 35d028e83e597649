"""Run the Python of a README, in an environment that has the package alone.

python tests/run_readme.py README.md
"""

import pathlib
import re
import sys

[page] = sys.argv[1:]
namespace = {}
for code in re.findall(
    r"```python\n(.*?)```", pathlib.Path(page).read_text(), re.DOTALL
):
    exec(compile(code, page, "exec"), namespace)
print(namespace["ivon_jax"].__file__, namespace["ivon_jax"].__version__)
