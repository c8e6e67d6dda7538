# make demo    set up, train four methods on embedded data, write a report (a few minutes)
# make test    set up, run every check and test
# make test-slurm  runs on a Slurm of two nodes, started here for it (a part of make test)
# make bench   time this machine against what people use (about ten minutes; leave it alone)
# make faults  kill sixty runs at random moments and resume them (half an hour)
# make recipes run the recipes for ImageNet and generated images at toy size, killed and resumed
# make docs    the site, in site/html: every warning is an error, and the examples of its pages are run
# make wheel   what `pip install` takes, in dist/, checked
# make check   formatting, types, imports, quick tests (90 s)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Small models: more threads than one a process only get in each other's way. Bytecode is written,
# also where the environment says not to: hundreds of processes import the same files.
RUN_TESTS := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/pytest

.PHONY: setup demo check test test-slurm bench site docs faults recipes lint wheel rooms schema lock clean

setup: $(VENV)/.installed

# torchattacks, which the tests use as a judge, asks for a requests of 2020: install it alone.
$(VENV)/.installed: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "dist-adv needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 1; }
	@echo "installing torch and what else is needed into $(VENV): some minutes without a word ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c requirements.lock -e '.[test,dev,docs]'
	$(BIN)/pip install --quiet --no-deps torchattacks==3.5.1
	@touch $@

demo: setup
	$(BIN)/dist-adv demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/rooms.py --check || { echo 'docs/design.md shows other rooms: make rooms'; exit 1; }
	$(BIN)/zizmor --quiet --offline .github/workflows
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/python docs/methods.py --check || { echo 'README.md shows other methods: make rooms'; exit 1; }

# A wheel and a source distribution in dist/; a test compares the wheel with the checkout. An old build/
# would bring back files that are gone. The tools are a release's alone, and not in the lock.
wheel: setup
	rm -rf build dist
	$(BIN)/uvx validate-pyproject==0.27 pyproject.toml
	$(BIN)/uv build --quiet
	$(BIN)/uvx twine==7.0.0 check --strict dist/*
	$(BIN)/uvx check-wheel-contents==0.6.3 dist/*.whl
	DIST_ADV_WHEEL=$$(ls dist/*.whl) $(BIN)/pytest tests/launch/test_wheel.py

# Which tests must be one worker's is said in tests/conftest.py, and what comes first.
SHARED_OUT := --dist loadgroup --no-loadscope-reorder

check: lint
	$(RUN_TESTS) -n 2 $(SHARED_OUT) -m "not slow"

# For two cores: three workers, as many a test waits for processes that it has started. The tests of
# Slurm wait more than they work: they and `lint` run beside the others, and are shown at the end.
test: setup
	@$(MAKE) --no-print-directory lint site > $(VENV)/lint.log 2>&1 & lint=$$!; \
	$(MAKE) --no-print-directory test-slurm > $(VENV)/slurm.log 2>&1 & slurm=$$!; \
	$(RUN_TESTS) -n 3 $(SHARED_OUT) --durations=10 --ignore=tests/slurm; others=$$?; \
	wait $$lint; lint=$$?; wait $$slurm; slurm=$$?; cat $(VENV)/lint.log $(VENV)/slurm.log; \
	exit $$((others || slurm || lint))

# Installs Debian's slurm-wlm where that is allowed. Where no cluster can be had it says why.
test-slurm: setup
	$(RUN_TESTS) -vv -rs --durations=0 tests/slurm

# With DATA, a folder of CIFAR-10, and RUN, a robust run on it, the attack is timed on that.
bench: setup
	$(BIN)/dist-adv bench $(if $(RUN),--run $(RUN)) $(if $(DATA),--data $(DATA))

# Dead links and public names without a page are warnings of Sphinx's. -E: docstrings are sources, too.
site: setup
	$(BIN)/sphinx-build -E -W -n --keep-going -q -c docs . site/html

docs: site
	$(RUN_TESTS) tests/cli/test_pages.py
	@echo "look at site/html/index.html"

# Sixty runs killed at random moments (about half an hour); the seed is printed.
faults: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/kill_anywhere.py --draws 60

# Seven recipes, each killed twice (some five minutes).
recipes: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/recipes.py --kills 2

rooms: setup
	$(BIN)/python docs/rooms.py
	$(BIN)/python docs/methods.py

schema: setup
	$(BIN)/python -m dist_adv.config > configs/schema.json

# Newest versions that fit pyproject.toml; torch and torchvision stay as they are pinned now.
lock: setup
	grep -E '^torch(vision)?==' requirements.lock > $(VENV)/torch.txt
	head -2 requirements.lock > $(VENV)/new.lock
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 \
	  --no-header --no-annotate --quiet --constraint $(VENV)/torch.txt >> $(VENV)/new.lock
	mv $(VENV)/new.lock requirements.lock

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info build dist site
