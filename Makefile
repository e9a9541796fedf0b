# `make demo` and `make test` need nothing but Python 3.11 or newer (with venv) and make; see `make help`.

# The first of these that is new enough; name another with `make demo PYTHON=/path/to/python3.12`.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
TV_VENV ?= .venv-torchvision
DS_VENV ?= .venv-deepspeed
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SUITE ?= demo
RUNS ?= runs
BENCH ?= $(RUNS)/bench.json
BENCH_ARGS ?=
PYTEST_ARGS ?= -n 2

# `make claims CLAIMS=--all` for all of them.
CLAIMS ?= --sample 2

.PHONY: help demo bench test claims torture test-torchvision test-deepspeed lint format types imports site wheel python clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     five tasks, sequential LoRA and KeepLoRA++, a table and a report (reuses what is there)"
	@echo "make bench    the table of ratios of docs/speed.md on this machine, in \$$(BENCH) and beside it as .md (goes on where it stopped)"
	@echo "make test     the whole test suite"
	@echo "make claims   check docs/claims/claims.yaml: all kept numbers, and the short forms of two that run (others each day)"
	@echo "make torture  the long form of tests/torture: thousands of damaged and hostile inputs; prints the counts"
	@echo "make test-torchvision   the official video processors against ours, in an environment of its own (some 6 GB)"
	@echo "make test-deepspeed     runs and loops under DeepSpeed, in an environment of its own (needs a C++ compiler; some minutes)"
	@echo "make lint     ruff check and ruff format --check (make format mends)"
	@echo "make types    pyright"
	@echo "make imports  which way imports may go (import-linter)"
	@echo "make site     the documentation as a site in site/ (mkdocs, any warning is an error)"
	@echo "make wheel    build sdist and wheel into dist/, install and try them outside the checkout"
	@echo "make clean    remove $(VENV), dist and caches; runs stay"

python:
	@test -n "$(PYTHON)" || { echo "Error: keeplora needs Python 3.11 or newer, and none of python3, python3.13, python3.12," \
	    "python3.11 is; install one, or name it: make demo PYTHON=/path/to/python3.12 (python3 here: $$(python3 --version 2>&1))" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Error: keeplora needs Python 3.11 or newer," \
	    "$(PYTHON) is $$($(PYTHON) --version 2>&1)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Error: $(PYTHON) cannot make virtual environments;" \
	    "on Debian and Ubuntu install the package python3-venv" >&2; exit 1; }

# One environment, made anew whenever what it is made from changes. A stamp is written last, so one that was interrupted
# is made again.
$(BIN)/.assets: pyproject.toml constraints.txt | python
	@echo "== virtual environment $(VENV) (some minutes the first time)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(INSTALL) -e '.[assets]'
	@touch $@

$(BIN)/.test: $(BIN)/.assets
	@$(INSTALL) -e '.[assets,test]'
	@touch $@

$(BIN)/.dev: $(BIN)/.test
	@$(INSTALL) -e '.[assets,test,dev]'
	@touch $@

$(BIN)/.docs: $(BIN)/.dev
	@$(INSTALL) -e '.[assets,test,dev,docs]'
	@touch $@

demo: $(BIN)/.assets
	@echo "== pretrained towers (174 MB, once)"
	@$(BIN)/keeplora assets fetch
	@$(BIN)/python scripts/demo.py --suite $(SUITE) --runs $(RUNS)

# Without a network the demo's model is left out, and the table says so.
bench: $(BIN)/.assets
	@$(BIN)/keeplora assets fetch || true
	$(BIN)/python benchmarks/all.py --output $(BENCH) --resume $(BENCH_ARGS)

# Without a network the tests that need the real towers are skipped with a reason; in CI they must not be.
test: $(BIN)/.test
	@$(BIN)/keeplora assets fetch || test -z "$$CI"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

claims: $(BIN)/.test
	@$(BIN)/keeplora assets fetch || test -z "$$CI"
	$(BIN)/python scripts/claims.py
	$(BIN)/python scripts/claims.py check $(CLAIMS)

# The last -m counts: pyproject.toml leaves these out of `make test`.
torture: $(BIN)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p tests.torture.fuzz_summary -m torture tests/torture

# torch and torchvision as the index has them, which may be CUDA builds: they run on a CPU too.
$(TV_VENV)/bin/.torchvision: pyproject.toml constraints.txt | python
	@$(PYTHON) -m venv --clear $(TV_VENV)
	@grep -v '^torch==' constraints.txt > $(TV_VENV)/constraints.txt
	@$(TV_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c $(TV_VENV)/constraints.txt \
	    torch torchvision -e '.[assets,test]'
	@touch $@

test-torchvision: $(TV_VENV)/bin/.torchvision
	KEEPLORA_NEED_TORCHVISION=1 OMP_NUM_THREADS=1 $(TV_VENV)/bin/python -m pytest tests/models/test_video_processors_official.py

# The project's own versions, and constraints-deepspeed.txt for what the extra adds. DeepSpeed is code alone until it first runs,
# and compiles then what it needs of C++ (DS_BUILD_OPS=0).
$(DS_VENV)/bin/.deepspeed: pyproject.toml constraints.txt constraints-deepspeed.txt | python
	@command -v c++ >/dev/null || { echo "Error: DeepSpeed compiles when it first runs, and there is no C++ compiler;" \
	    "on Debian and Ubuntu install the package g++" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(DS_VENV)
	@DS_BUILD_OPS=0 $(DS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    -c constraints-deepspeed.txt -e '.[assets,test,deepspeed]'
	@touch $@

# PATH: ninja, which the compiling needs, lies in the environment.
test-deepspeed: $(DS_VENV)/bin/.deepspeed
	PATH="$(abspath $(DS_VENV))/bin:$$PATH" OMP_NUM_THREADS=1 $(DS_VENV)/bin/python -m pytest \
	    tests/ranks/test_deepspeed_runs.py tests/experiment/test_zero.py tests/ranks/test_sharded.py -k "deepspeed or zero"

lint: $(BIN)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .

format: $(BIN)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(BIN)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

imports: $(BIN)/.dev
	$(BIN)/lint-imports

# Not --quiet: mkdocs then sees no warning, and --strict has nothing to fail on.
site: $(BIN)/.docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -W ignore::DeprecationWarning -m mkdocs build --strict
	@echo "site/index.html: $$(find site -name '*.html' | wc -l) pages"

wheel: $(BIN)/.dev
	$(BIN)/python scripts/check_wheel.py

clean:
	rm -rf $(VENV) dist build site .pytest_cache .ruff_cache .hypothesis .import_linter_cache
