PYTHON ?= python3
CACHE ?= .cache
MODEL ?=
DOMAINS ?=
SPARSITY ?= 0.3
BIN = .venv/bin

.PHONY: install demo test test-real lint format results benchmark benchmark-healing benchmark-expansion benchmark-entanglement benchmark-routing benchmark-auto benchmark-prompt benchmark-mixture benchmark-sgatlin benchmark-isoflop benchmark-distil benchmark-memory benchmark-speed benchmark-token-speed benchmark-int8 benchmark-engines docs clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/python demo/run.py --cache "$(CACHE)" --model "$(MODEL)" --domains "$(DOMAINS)" --sparsity "$(SPARSITY)"

results: install
	$(BIN)/python demo/run.py --cache "$(CACHE)" --sparsity "$(SPARSITY)" --readme README.md

benchmark: install
	$(BIN)/python benchmarks/quality.py --cache "$(CACHE)" --page docs/measured.md

benchmark-healing: install
	$(BIN)/python benchmarks/healing.py --cache "$(CACHE)" --page docs/measured.md

benchmark-expansion: install
	$(BIN)/python benchmarks/expansion.py --cache "$(CACHE)" --page docs/measured.md

benchmark-entanglement: install
	$(BIN)/python benchmarks/entanglement.py --cache "$(CACHE)" --page docs/measured.md

benchmark-routing: install
	$(BIN)/python benchmarks/routing.py --cache "$(CACHE)" --page docs/measured.md

benchmark-auto: install
	$(BIN)/python benchmarks/auto.py --cache "$(CACHE)" --page docs/measured.md

benchmark-prompt: install
	$(BIN)/python benchmarks/prompt.py --cache "$(CACHE)" --page docs/measured.md

benchmark-mixture: install
	$(BIN)/python benchmarks/mixture.py --cache "$(CACHE)" --page docs/measured.md

benchmark-sgatlin: install
	$(BIN)/python benchmarks/sgatlin.py --page docs/measured.md

benchmark-isoflop: install
	$(BIN)/python demo/fetch.py --cache "$(CACHE)" --texts code law medicine
	$(BIN)/python benchmarks/isoflop.py --text $(foreach name,code law medicine,"$(CACHE)/texts/$(name)") --output "$(CACHE)/benchmarks/isoflop" --processes 2 --page docs/measured.md

benchmark-distil: install
	$(BIN)/python benchmarks/distillation.py --cache "$(CACHE)" --page docs/measured.md

benchmark-memory: install
	$(BIN)/python benchmarks/memory.py

benchmark-speed: install
	$(BIN)/python benchmarks/speed.py --cache "$(CACHE)" --page docs/measured.md

benchmark-token-speed: install
	$(BIN)/python benchmarks/token_speed.py --cache "$(CACHE)" --page docs/measured.md

benchmark-int8: install
	$(BIN)/python benchmarks/int8.py --cache "$(CACHE)" --page docs/measured.md

benchmark-engines: install
	$(BIN)/python benchmarks/engines.py --cache "$(CACHE)" --page docs/measured.md

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

test-real: install
	$(BIN)/python demo/fetch.py --cache "$(CACHE)" --model --texts
	$(BIN)/python -m pytest -q -m real

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	$(BIN)/mkdocs build --quiet --strict --site-dir build/site

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache
