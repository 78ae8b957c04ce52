# Two commands: `make demo` walks the whole loop here, `make test` runs everything that CI runs.

PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet $(PIP_FLAGS) \
	--constraint constraints.txt

.PHONY: demo test lint format lock clean

demo: $(VENV)/.run
	rm -rf layline-demo
	$(VENV)/bin/layline demo -o layline-demo

test: lint
	$(VENV)/bin/python -m pytest -m "slow or not slow"

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The plain torch of the package index: the CPU build where the index is set up for it, else CUDA.
$(VENV)/.run: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "layline needs Python 3.11 or newer; try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo "this Python cannot make virtual environments; try: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[run]'
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) --editable '.[run,dev]'
	touch $@

lock: $(VENV)/.dev
	( echo "# The exact versions that the tests ran with; regenerate with: make lock"; \
	$(VENV)/bin/python -m pip freeze --exclude-editable | sed 's/+cpu//' ) > constraints.txt.new
	mv constraints.txt.new constraints.txt

clean:
	rm -rf $(VENV) layline-demo
