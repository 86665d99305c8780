.DEFAULT_GOAL := help
.PHONY: help setup edit test slow test-app lint format notebooks speed quality bench attention picturebook clean
PY := .venv/bin/python

help:           ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup:          ## a virtual environment with the package, its tests and linters
	python3 -m venv .venv
	.venv/bin/pip install -e '.[dev]'

edit:           ## edit the built-in example
	.venv/bin/masafusion edit

test:           ## the fast tests, under six minutes on two cores
	.venv/bin/pytest -n 2

slow:           ## the slow tests: trained weights, kill loops, the SD-1.4-shaped model
	.venv/bin/pytest -m slow -o timeout=1800

test-app:       ## the annotation lab in Chromium, attacked, and killed; the explorer in Chromium
	.venv/bin/pytest -m slow -o timeout=600 tests/test_app_browser.py tests/test_app_wire.py tests/test_explorer.py

lint:           ## ruff, formatting, types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format:         ## let ruff put it right
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

notebooks:      ## build the notebooks from their scripts and run them
	.venv/bin/jupytext --to ipynb notebooks/*.py
	.venv/bin/pytest --nbmake notebooks

speed:          ## the benchmark of the engine: ratios within one run
	$(PY) -m experiments.speed

quality:        ## 50 test edits of the picture-book world, DI and NTI
	$(PY) -m experiments.edit_quality

bench:          ## Table 1 on ten cases of the picture-book world
	$(PY) -m experiments.table1 --quick

attention:      ## what watching costs, word maps against true regions, interference by method
	$(PY) -m experiments.attention

picturebook:    ## the whole training recipe of the picture-book model (hours on two cores, minutes on a GPU)
	$(PY) -m experiments.picturebook.all

clean:          ## remove runs and caches, not checkpoints
	rm -rf runs .pytest_cache .ruff_cache .mypy_cache
