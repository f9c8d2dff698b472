PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python

.PHONY: demo test results clean

demo: $(VENV)/.demo-ready  ## set up if needed, then align a small transformer from demonstrations
	rm -rf out/demo
	$(PY) afd.py --out out/demo

test: $(VENV)/.test-ready  ## set up if needed, then run the tests
	$(PY) -m pytest

results: $(VENV)/.demo-ready  ## every run of the README over five seeds; goes on where it stopped
	$(PY) docs/results.py

$(VENV)/.demo-ready: requirements.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'error: Python 3.11 or newer is needed')"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing torch and five more packages, once: some minutes"
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.test-ready: $(VENV)/.demo-ready requirements-dev.txt
	$(PY) -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) out
