# `make quickstart`, `make test` and the others set themselves up in .venv, once.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart docs test test-fast mutants lint clients accelerators benchmark page

quickstart: .venv/examples.installed
	$(BIN)/python examples/digits.py

# The site, in docs/_build/html: runs the examples, and then the code of the pages.
docs: .venv/docs.installed
	JAX_PLATFORMS=cpu $(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs docs/_build/html
	JAX_PLATFORMS=cpu $(BIN)/pytest tests/test_pages.py tests/test_site.py tests/test_browser.py
	@echo "Open docs/_build/html/index.html"

test: .venv/test.installed
	$(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# Without what takes more than some seconds. `make test`, and so CI, has all of it.
test-fast: .venv/test.installed
	$(BIN)/pytest -m "not slow" --numprocesses auto --dist loadfile --no-loadscope-reorder

# Breaks the package in hundreds of places: an hour or more. ONLY="_update_rules metrics.accuracy" is quick.
mutants: .venv/test.installed
	nice $(BIN)/python tests/mutants.py $(ONLY)

lint: .venv/test.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Other people's trainers and tools, in a folder of their own: hundreds of megabytes.
# HEAVY="keras brax" also installs and tests these; see tests/clients/test_heavy.py.
clients: .venv-clients/installed
	$(if $(HEAVY),.venv-clients/bin/python -m pip install --quiet $(HEAVY))
	CLIENTS="light $(HEAVY)" .venv-clients/bin/python -m pytest tests/clients

.venv-clients/installed: pyproject.toml
	$(PYTHON) -m venv .venv-clients
	@echo "Installing ivon-jax[clients] into .venv-clients: some minutes, once"
	.venv-clients/bin/python -m pip install --quiet --editable ".[clients]"
	@touch $@

# Compiles GPT-2's step for TPU v5e and H100, without a chip: ten minutes, once 500 MB.
# In a folder of its own, because there jax looks for chips.
accelerators: .venv-accelerators/installed
	JAX_PLATFORMS=cpu .venv-accelerators/bin/python -m pytest tests/test_accelerators.py

.venv-accelerators/installed: pyproject.toml
	$(PYTHON) -m venv .venv-accelerators
	@echo "Installing ivon-jax[accelerators] into .venv-accelerators: some minutes, once"
	.venv-accelerators/bin/python -m pip install --quiet --editable ".[accelerators]"
	@touch $@

# DATA=folder has the data sets; ONLY="uci _mnist" measures these again.
benchmark: .venv/benchmarks.installed
	DATA="$(DATA)" $(BIN)/python benchmarks/run.py $(ONLY)

# benchmarks/README.md and its plots, from page.md and the data in results/.
page: .venv/benchmarks.installed
	$(BIN)/python benchmarks/render.py

.venv/%.installed: pyproject.toml | .venv/bin/python
	@echo "Installing ivon-jax[$*] into .venv: a minute or two, once"
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	@touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv
