# The two commands:  make demo   make test
# Both create .venv from $(PYTHON) and install the pinned dependencies; a second run finds them there.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := build/demo
PARTICIPANTS ?= 200

.PHONY: demo test lint clean

demo: $(INSTALLED)
	rm -rf $(DEMO)
	$(BIN)/ingest simulate $(DEMO)/ukb --participants $(PARTICIPANTS)
	$(BIN)/ingest $(DEMO)/ukb $(DEMO)/ukb.zarr --phenotypes $(DEMO)/ukb/phenotypes.csv
	$(BIN)/ingest inspect $(DEMO)/ukb.zarr
	@# Exit code 3: the weights cannot be had (said in one line). Anything else is a failure.
	@$(BIN)/extract $(DEMO)/ukb.zarr $(DEMO)/embeddings.zarr --weights imagenet || { test $$? -eq 3 && \
	  echo "going on with random weights" && $(BIN)/extract $(DEMO)/ukb.zarr $(DEMO)/embeddings.zarr --weights random; }
	$(BIN)/probe $(DEMO)/embeddings.zarr --report $(DEMO)/report.html

test: lint
	@# One thread each for torch: the tests run side by side, and OpenMP's threads spin while they wait for one another.
	@# Most are about a CPU: where there is a GPU, its own tests run by themselves.
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
	if nvidia-smi -L > /dev/null 2>&1; then $(BIN)/pytest -m gpu; fi

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dali,dev,bench]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
