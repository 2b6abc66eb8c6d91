# The habits: make setup, train, test, torture, lint, bench. ARGS adds flags: make train ARGS="--max_steps 500"
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

# Some tests wait for processes that they started, so there is one more at work than there are cores.
# Each program has one thread: two threads of a program wait for each other in every product, the longer the busier the cores.
TESTERS := $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)

# What a command needs of the installed packages is compiled when it is first imported: compiling all is half of the set-up.
# It is kept even where Python is told not to, because the tests start hundreds of programs.
export PYTHONDONTWRITEBYTECODE :=

# Beside a folder of shared caches (development and CI), tests and training read from it.
ifneq ($(wildcard ../shared/data),)
export LOSSCURVE_CACHE ?= $(abspath ../shared/data)
export LOSSCURVE_SPEC ?= $(abspath ../shared/spec)
endif

.PHONY: setup train test torture lint bench clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable ".[dashboard,tensorboard,wandb,test,lint]"
	touch $@

# The sample is of the run that was trained, wherever ARGS put it.
train: setup
	$(BIN)/python -m scripts.train $(ARGS)
	$(BIN)/python -m scripts.sample $$(echo "$(ARGS)" | grep -oE -- "--out[-_]dir[ =]+[^ ]+")

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TESTERS) --dist loadfile --no-loadscope-reorder $(ARGS)

torture: setup
	-$(BIN)/pip install --quiet --disable-pip-version-check "atheris>=2.3"
	-$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt peft trl lm-eval transformer-lens
	LOSSCURVE_TORTURE=1 $(BIN)/python -m pytest -n auto --dist load tests/faults tests/test_distributed.py tests/test_recipes.py tests/test_rehearse.py $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

bench: setup
	$(BIN)/python -m benchmarks.step $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
