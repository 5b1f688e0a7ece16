# Everything runs in .venv, which the first command makes. The two to start with:
#   make demo    a picture of generated digits
#   make test    the tests

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-all test-versions test-machines test-gpu parity soak lint digits digits-features tpu-check clean

demo: .venv/installed
	$(BIN)/python -m titok_jax.sample --overwrite

# Two files of tests at a time: compiling, which takes most of the time, keeps one core busy. 10 minutes on 2 CPU cores.
test: .venv/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The 13 published models at full size, one at a time, against what the published code gave with the same weights; prints the
# rows of the table in docs/parity.md. About 7 minutes on 2 CPU cores, 4.2 GB of memory.
parity: .venv/installed-test
	$(BIN)/python -m pytest tests/test_parity_full.py -m "parity or not parity" -s

# A GAN in training, killed twenty times with SIGKILL at random moments, by one process and by two: ends bit for bit as one that
# is not.
soak: .venv/installed-test
	$(BIN)/python -m pytest tests/test_soak.py -m soak -s

# The numeric tests on simulated machines: other instruction sets, one thread, another kernel of numpy's matrix products. 40
# minutes on 2 CPU cores.
test-machines: .venv/installed-test
	$(BIN)/python tests/machines.py

# The numeric tests with float32 products on the GPU that JAX finds, whichever it is: models against the published code, losses,
# sampling and training steps (ON_GPU in tests/machines.py). Not the files that compute in numpy or on the host, and no long
# tests. Interrupted after 460 seconds, so that it ends within 8 minutes. Needs JAX for that GPU in .venv, as README.md says:
#   .venv/bin/pip install -c constraints.txt -e ".[train,test,cuda]"
# Without a GPU it says so and ends with status 2.
test-gpu: .venv/installed-test
	$(BIN)/python tests/machines.py gpu

# The library and a short training with the lowest and the newest jax and flax that pyproject.toml allows, in .venv-lowest and
# .venv-newest. Later versions of jax need a newer Python: PYTHON_NEWEST, or python3.13 or python3.12 if one is there. 12 minutes
# on 2 busy CPU cores.
test-versions: .venv/python
	$(BIN)/python tests/versions.py

# Every test, in an environment that also has PyTorch and the TPU compiler, so that none is left out. Two hours on 2 CPU cores.
test-all: .venv-all/installed
	$(MAKE) test
	.venv-all/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not parity and not soak"
	$(MAKE) parity soak test-machines

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Trains the embedded digits model again, both parts, into runs/digits, and measures it. About 15 minutes on 2 CPU cores.
digits: .venv/installed
	$(BIN)/python -m titok_jax.train --config configs/digits.py:tokenizer --workdir runs/digits/tokenizer
	$(BIN)/python -m titok_jax.train --config configs/digits.py:generator --workdir runs/digits/generator \
	  --config.tokenizer=runs/digits/tokenizer/pretrained
	$(BIN)/python -m titok_jax.evaluate --model runs/digits/generator/pretrained --json runs/digits/digits.json --overwrite

# Trains the feature network of digits-FID again. Half a minute on 2 CPU cores.
digits-features: .venv/installed
	mkdir -p runs
	$(BIN)/python tools/train_digits_features.py runs/digits_features.safetensors --overwrite

# Compiles the training steps and samplers of docs/tpu.md for TPU slices and prints its two tables, after the tests of what does
# that; no TPU is needed. Ten hours on 2 CPU cores. What is done is kept in runs/tpu_check.json: the same command goes on; delete the file to begin anew.
tpu-check: .venv-tpu/installed
	mkdir -p runs
	.venv-tpu/bin/python -m pytest tests/test_compile.py
	.venv-tpu/bin/python -m titok_jax.compile --all --results runs/tpu_check.json

clean:
	rm -rf .venv .venv-tpu .venv-all .venv-lowest .venv-newest .cache build dist *.egg-info

.venv/python:
	@test -n "$(PYTHON)" || { echo "error: no python3.11 or python3 on the PATH; set PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; set PYTHON=/path/to/a/newer/python" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: .venv/python pyproject.toml constraints.txt
	@echo "Installing into .venv: about a minute, about 1 GB"
	$(PIP_INSTALL) -e ".[train]"
	@touch $@

# The TPU compiler lies beside the other packages: in one environment with it JAX would look for a TPU at every start.
.venv-tpu/installed: .venv/installed-test
	@echo "Installing the TPU compiler into .venv-tpu: 684 MB"
	$(BIN)/python -m venv .venv-tpu
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > `.venv-tpu/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'`/titok_jax_packages.pth
	.venv-tpu/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt libtpu
	@touch $@

# As above, with PyTorch. On Linux pip takes a build with CUDA, of several GB; PIP_TORCH may name where a build for CPUs is.
.venv-all/installed: .venv-tpu/installed
	@echo "Installing PyTorch into .venv-all"
	$(BIN)/python -m venv .venv-all
	for packages in `$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'` \
	  `.venv-tpu/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'`; do echo $$packages; done \
	  > `.venv-all/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'`/titok_jax_packages.pth
	.venv-all/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_TORCH) torch
	@touch $@

.venv/installed-test: .venv/installed
	$(PIP_INSTALL) -e ".[train,test]"
	@touch $@
