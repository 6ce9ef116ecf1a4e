# Needs git, make and a Python from 3.10 to 3.12; everything else is set up in .venv.
SHELL := /bin/bash
.DEFAULT_GOAL := help
READY := .venv/.ready
BIN := .venv/bin

.PHONY: help setup demo demo-translation demo-generation test wheels interop optimum-peers generation-peers bench lint check unit docs clean

help:
	@echo "make demo   train, quantize and serve a classifier on real tweets, with a report (minutes)"
	@echo "make demo-translation   the same for a translator of software strings (15 minutes)"
	@echo "make demo-generation   fine-tune a small language model to write shell commands, and serve it in INT8"
	@echo "make test   all tests that need no GPU"
	@echo "make optimum-peers   transformers 4, optimum-onnx and OpenVINO, which bench/answering.py compares with, in an environment of their own"
	@echo "make generation-peers   the engines that bench/generation.py compares with, in an environment of their own (minutes)"
	@echo "make bench  measure the demos' models against other tools, on a quiet machine (an hour, without generation.py)"
	@echo "make interop   open exports in optimum-onnx, onnxruntime-genai and llama.cpp, ask lm-eval, and run Spark, Helm, promtool, Schemathesis and cyclonedx-bom, in environments of their own (minutes)"
	@echo "make wheels   a wheel each for Linux, macOS and Windows on x86-64, and for Linux and macOS on Arm, in build/wheels (minutes)"
	@echo "make lint   ruff, mypy, import layers and a strict build of the docs"
	@echo "make check  lint and unit tests (minutes)"
	@echo "make unit   unit tests"
	@echo "make docs   build the docs into build/docs"
	@echo "make clean  remove .venv and demo/"

setup: $(READY)

$(READY): pyproject.toml constraints.txt setup.sh setup.py $(shell find deploykit/runtime/engines/native/csrc deploykit/triton/guard -name "*.[ch]")
	@bash setup.sh .venv
	@touch $@

demo: $(READY)
	@$(BIN)/deploykit demo --output-dir demo

demo-translation: $(READY)
	@$(BIN)/deploykit demo --recipe translation --output-dir demo

demo-generation: $(READY)
	@$(BIN)/deploykit demo --recipe generation --output-dir demo

test: $(READY)
	@bash setup.sh --browser
	@bash setup.sh --emulator
	@# Files start in the order of collection. One thread per process: more would wait for each other on two cores.
	@# Hundreds of processes import deploykit: they compile it once, also where the environment says to keep no bytecode.
	@PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

LMEVAL_VENV ?= /tmp/deploykit-lmeval
OPTIMUM_VENV ?= /tmp/deploykit-optimum
LLAMA_VENV ?= /tmp/deploykit-llama
SPARK_PACKAGES ?= /tmp/deploykit-spark
HELM_FOLDER ?= /tmp/deploykit-helm
PROMTOOL_FOLDER ?= /tmp/deploykit-promtool
SCHEMATHESIS_VENV ?= /tmp/deploykit-schemathesis
SBOM_VENV ?= /tmp/deploykit-sbom
optimum-peers: $(READY)
	@test -x $(OPTIMUM_VENV)/bin/python || ($(BIN)/python -m venv $(OPTIMUM_VENV) && \
	  $(OPTIMUM_VENV)/bin/pip install --quiet 'optimum-onnx[onnxruntime]==0.1.0' 'transformers==4.57.6' \
	  'onnxruntime-genai==0.18.0' 'openvino==2026.4.1' sentencepiece)

interop: optimum-peers
	@test -x $(LLAMA_VENV)/bin/python || ($(BIN)/python -m venv $(LLAMA_VENV) && \
	  $(LLAMA_VENV)/bin/pip install --quiet 'xllamacpp==2026.10.11549')
	@test -x $(LMEVAL_VENV)/bin/lm_eval || ($(BIN)/python -m venv $(LMEVAL_VENV) && \
	  $(LMEVAL_VENV)/bin/pip install --quiet 'lm-eval[api]==0.4.13' transformers)
	@test -d $(SPARK_PACKAGES)/pyspark || $(BIN)/pip install --quiet --no-deps --target $(SPARK_PACKAGES) pyspark==4.3.0 py4j==0.10.9.9
	@test -x $(SCHEMATHESIS_VENV)/bin/schemathesis || ($(BIN)/python -m venv $(SCHEMATHESIS_VENV) && \
	  $(SCHEMATHESIS_VENV)/bin/pip install --quiet schemathesis==4.32.5)
	@test -x $(SBOM_VENV)/bin/cyclonedx-py || ($(BIN)/python -m venv $(SBOM_VENV) && \
	  $(SBOM_VENV)/bin/pip install --quiet cyclonedx-bom==7.5.0)
	@test -x $(HELM_FOLDER)/helm || $(BIN)/python tests/support/fetch_helm.py $(HELM_FOLDER)
	@test -x $(PROMTOOL_FOLDER)/usr/bin/promtool || (mkdir -p $(PROMTOOL_FOLDER) && cd $(PROMTOOL_FOLDER) && \
	  apt-get download --quiet=2 prometheus && dpkg -x prometheus_*.deb . && rm prometheus_*.deb) || echo "promtool is missing: its tests are skipped" >&2
	@OPTIMUM_VENV=$(OPTIMUM_VENV) LLAMA_VENV=$(LLAMA_VENV) LMEVAL_VENV=$(LMEVAL_VENV) SPARK_PACKAGES=$(SPARK_PACKAGES) HELM_FOLDER=$(HELM_FOLDER) \
	  SCHEMATHESIS_VENV=$(SCHEMATHESIS_VENV) SBOM_VENV=$(SBOM_VENV) PROMTOOL_FOLDER=$(PROMTOOL_FOLDER) \
	  $(BIN)/python -m pytest \
	  tests/integration/test_optimum.py tests/integration/test_question_answering_interop.py \
	  tests/integration/test_language_model_interop.py tests/integration/test_llama_cpp.py tests/integration/test_lm_eval.py \
	  tests/integration/test_spark.py tests/integration/test_helm.py tests/integration/test_schemathesis.py \
	  tests/integration/test_sbom.py tests/integration/test_promtool.py

GENERATION_VENV ?= /tmp/deploykit-generation
generation-peers: $(READY)
	@test -x $(GENERATION_VENV)/bin/python || ($(BIN)/python -m venv $(GENERATION_VENV) && \
	  $(GENERATION_VENV)/bin/pip install --quiet 'openvino-genai==2026.4.1' 'onnxruntime-genai==0.18.0' \
	  'xllamacpp==2026.10.11549')

bench: $(READY) optimum-peers generation-peers
	@$(BIN)/python bench/articles.py
	@$(BIN)/python bench/classification.py
	@$(BIN)/python bench/exactness.py
	@OPTIMUM_VENV=$(OPTIMUM_VENV) $(BIN)/python bench/answering.py
	@# Keep freed memory in the process: on virtual machines, getting it back makes all contenders several times slower.
	@MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000 $(BIN)/python bench/translation.py
	@MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000 GENERATION_VENV=$(GENERATION_VENV) $(BIN)/python bench/generation.py
	@$(BIN)/python bench/table.py

wheels: $(READY)
	@for target in linux-x86_64 linux-aarch64 darwin-arm64 darwin-x86_64 win32-AMD64; do \
	  DEPLOYKIT_TARGET=$$target $(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheels . || exit 1; \
	done

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@MYPYPATH=tests/packages/token_classification $(BIN)/mypy -p token_classification
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/docs
	@$(BIN)/lint-imports

docs: $(READY)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/docs

# The type checker takes most of a minute, on one core.
check: $(READY)
	@$(MAKE) --no-print-directory -j 2 lint unit

unit: $(READY)
	@PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/unit

clean:
	rm -rf .venv demo
