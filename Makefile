# `make demo` runs the whole loop; `make test` runs the tests. Both set up .venv first, with pinned CPU builds.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell $(name) -c 'import sys; sys.version_info >= (3, 11) and print(sys.executable)' 2>/dev/null)))
BIN := .venv/bin
READY := .venv/.ready
# Package sources that the environment names for pip are honoured.
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
FIND_LINKS := $(foreach source,$(PIP_FIND_LINKS),--find-links $(source))
INSTALL := $(BIN)/uv pip install --python $(BIN)/python --no-deps $(FIND_LINKS)
PYTORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
export HF_HUB_OFFLINE ?= 1
# Dozens of processes import the same packages: where none keeps its bytecode, each compiles them anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-heavy lint format docs lock gpu-kit setup clean help

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## Make .venv with pinned CPU builds

$(READY): requirements/cpu.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "selma_ray needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 2; }
	@echo "Setting up .venv with $(PYTHON) (about 4 GB)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^uv==' requirements/cpu.txt)"
	@$(INSTALL) --quiet -r requirements/cpu.txt \
		|| { echo "The CPU build of torch is not among this environment's sources: taking it, and it alone, from PyTorch's index"; \
		     $(INSTALL) --default-index $(PYTORCH_CPU_INDEX) "$$(grep -o '^torch==[^ ]*+cpu' requirements/cpu.txt)"; \
		     $(INSTALL) -r requirements/cpu.txt; }
	@$(INSTALL) --quiet -e .
	@touch $@

demo: $(READY) ## Run the whole loop on the miniature and serve its merged model
	@$(BIN)/selma run jobs/recipes/demo.yaml

# Unit tests and the GPU kit's, which run without Ray, on every core, the kit's few and long ones first; what starts Ray, one after another.
test: $(READY) ## Run the test suite
	@$(BIN)/python -m pytest tests/gpu tests/unit -m "not heavy and not gpu" --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
	@$(BIN)/python -m pytest tests/integration tests/e2e -m "not heavy and not gpu" --durations 25

test-heavy: $(READY) ## Run the tests that take minutes
	@$(BIN)/python -m pytest -m "heavy and not gpu"

lint: $(READY) ## Check style, types and the layers of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(READY) ## Format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(READY) ## Build the documentation into site/; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# For every Python from 3.11 on: both files are universal, with markers where versions or machines differ.
COMPILE := $(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --no-header --no-annotate --quiet

lock: $(READY) ## Resolve pyproject.toml into requirements/cpu.txt and gpu.txt
	@$(COMPILE) --extra cpu --extra dev --extra docs --extra trackers --override requirements/overrides.txt $(FIND_LINKS) -o requirements/cpu.txt
	@$(COMPILE) --extra gpu --override requirements/overrides_gpu.txt -o requirements/gpu.txt

gpu-kit: $(READY) ## Lay wheels for a CUDA machine without a network into .gpu-kit
	@$(BIN)/python -m benchmarks.gpu_kit

clean: ## Delete .venv, the runs and the kit
	@rm -rf .venv runs site .gpu-kit
