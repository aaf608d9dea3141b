# One environment for all, in .venv, built from constraints.txt. Needs Python 3.11, 3.12 or 3.13 and nothing else.
PYTHON  ?= python3
PROFILE ?= cpu
VENV    := .venv
READY   := $(VENV)/.ready
RUN     := $(VENV)/bin/
.DEFAULT_GOAL := help
.PHONY: help reproduce test test-all rooms docs types lab soak readme lint check-results
QUIET   := GET_NB_PROGRESS=off OMP_NUM_THREADS=1
export JUPYTER_PLATFORM_DIRS := 1

help:            ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  PROFILE=$(PROFILE)         profile of make reproduce: a name in nbs/paper/profiles"

$(READY): constraints.txt settings.ini pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "get_nb needs Python 3.11, 3.12 or 3.13, this is %d.%d: name one with make PYTHON=python3.12" % v)'
	@echo "Bringing $(VENV) up to date (from nothing: a few minutes, about 7 GB with the CUDA build of torch)"
	@test -x $(RUN)pip || $(PYTHON) -m venv --clear $(VENV)
	@PIP_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(RUN)pip install -q -e '.[dev]'
	@touch $(READY)

reproduce: $(READY)  ## train, generate, distil, evaluate and draw everything of a profile (PROFILE=cpu); what is up to date is kept
	@$(RUN)get-nb reproduce --profile $(PROFILE)

check-results: $(READY) ## compare what make reproduce has made with the published results; fails on a deviation
	@$(RUN)get-nb check --profile $(PROFILE)

test: $(READY)   ## the rooms, each in a fresh kernel, and the tests of tests/
	@$(QUIET) $(RUN)pytest

test-all: $(READY) ## the same, and what is slower: tests marked slow, the campaigns of tests/soak
	@$(QUIET) $(RUN)pytest -o addopts=-q tests

rooms: $(READY)  ## run every room and save its outputs (ROOMS="nbs/12_sampler.ipynb ..." for some)
	@$(QUIET) $(RUN)python tests/rooms.py $(ROOMS)

$(VENV)/.docs: $(READY)
	@PIP_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(RUN)pip install -q -e '.[docs,types]'
	@touch $@

docs: $(VENV)/.docs ## build the site from the saved notebooks, without a network: _docs/html/index.html
	@$(RUN)python -m sphinx -q -W --keep-going -c docs -b html -d _docs/doctrees . _docs/html
	@echo "_docs/html/index.html"

types: $(VENV)/.docs ## the type checker over the public names
	@$(RUN)mypy

lab: $(READY)    ## open the start page, and all rooms, in JupyterLab
	@$(RUN)jupyter lab nbs/start.ipynb

soak: $(READY)   ## the long campaigns of tests/soak
	@$(QUIET) $(RUN)pytest tests/soak -o addopts=-q -s

readme: $(READY) ## write the published results into README.md and results/README.md
	@$(RUN)python -c "from get_nb.lab.readme import write_texts; write_texts()"

lint: $(READY)   ## ruff, clean notebooks, package in step with them
	@$(RUN)pre-commit run --all-files
