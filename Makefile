# Needs git, make and a Python from 3.10 to 3.12; everything else is set up in .venv.
SHELL := /bin/bash
.DEFAULT_GOAL := help
READY := .venv/.ready
BIN := .venv/bin

.PHONY: help setup demo demo-translation test bench lint check docs clean

help:
	@echo "make demo   real tweets to a served INT8 classifier, with a report (minutes)"
	@echo "make demo-translation   software strings to a served INT8 translator (a quarter of an hour)"
	@echo "make test   all tests that need no GPU"
	@echo "make bench  both demos' models beside their peers, on a quiet machine (an hour)"
	@echo "make lint   ruff, mypy, import layers and a strict build of the docs"
	@echo "make check  lint and unit tests (minutes)"
	@echo "make docs   build the docs into build/docs"
	@echo "make clean  remove .venv and demo/"

setup: $(READY)

$(READY): pyproject.toml constraints.txt setup.sh setup.py $(shell find deploykit/runtime/engines/native/csrc -name "*.[ch]")
	@bash setup.sh .venv
	@touch $@

demo: $(READY)
	@$(BIN)/deploykit demo --out demo

demo-translation: $(READY)
	@$(BIN)/deploykit demo --recipe translation --out demo

test: $(READY)
	@bash setup.sh --browser
	@$(BIN)/python -m pytest

bench: $(READY)
	@$(BIN)/python bench/articles.py
	@$(BIN)/python bench/classification.py
	@$(BIN)/python bench/exactness.py
	@# Memory that is freed stays in the process: on virtual machines, fetching it back slows all contenders several times.
	@MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000 $(BIN)/python bench/translation.py
	@$(BIN)/python bench/table.py

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/mkdocs build --strict --quiet --site-dir build/docs
	@$(BIN)/lint-imports

docs: $(READY)
	@$(BIN)/mkdocs build --strict --site-dir build/docs

check: lint
	@$(BIN)/python -m pytest tests/unit

clean:
	rm -rf .venv demo
