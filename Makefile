# What a contributor runs. `make` alone lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
export MUJOCO_GL ?= egl
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help install lint format types test slow docs serve tables demo wheel ci

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: ## everything into the active environment
	python -m pip install -c constraints.txt -e ".[test,docs]"

lint: ## ruff, without changing anything
	ruff check .
	ruff format --check .

format: ## ruff, changing files
	ruff check --fix .
	ruff format .

types: ## pyright
	pyright

test: ## the fast tests: no simulator, nothing slow
	python -m pytest -m "not slow and not simulator"

slow: ## all other tests; Ray's by themselves, since each makes a cluster of this machine
	python -m pytest -m "slow or simulator" --ignore-glob="*/test_ray*"
	python -m pytest -m "slow or simulator" tests/integrations/test_ray*.py

docs: ## the site, warnings are errors
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

serve: ## the site, live on port 8000
	mkdocs serve

tables: ## whether published tables are those of the result files
	python benchmarks/render_tables.py --check

demo: ## the quick demo
	vla-rl demo --quick --workdir "runs/make-demo-$$(date +%Y%m%d-%H%M%S)"

wheel: ## build it, install it into an empty environment, try it there
	rm -rf build/wheel dist
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet -c constraints.txt "$$(ls dist/vla_rl-*.whl)[lora]"
	cp tests/wheel_check.py build/wheel/
	cd build/wheel && venv/bin/python wheel_check.py
	cd build/wheel && venv/bin/vla-rl train toy --workdir toy --train.stage0.steps 20 --train.stage2.steps 10 \
		--train.stage1.total-timesteps 1024 --train.eval-episodes 4 --train.rl-eval-episodes 4 --train.no-stop-at-zero
	test -s build/wheel/toy/report.md

ci: ## everything, in a fresh environment
	.ci/run
