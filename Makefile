# Everything runs in .venv, which `setup` makes; the other targets call it when it is missing or out of date.
PYTHON ?= python3
RUN := .venv/bin/python
export PATH := $(CURDIR)/.venv/bin:$(PATH)

# `make demo IMAGE=... DRIVING=... PROMPT=... OUTPUT=...` animates other pictures after other clips
IMAGE ?= examples/jumps.png
DRIVING ?= examples/jumps.mp4
PROMPT ?= a person in a green shirt and yellow trousers jumps, snow is falling
OUTPUT ?= demo.mp4
# `make parity GOLDENS=directory MANIFESTS=directory DEVICE=cuda`
GOLDENS ?= tests/goldens
MANIFESTS ?=
DEVICE ?= cpu

.PHONY: setup protos demo test test-slow quality check format parity certs clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt scripts/install.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(RUN) scripts/install.py
	touch $@

# stubs of the contracts
STUBS := bunraku/v1/gateway_pb2.py
protos: $(STUBS)

$(STUBS): $(wildcard protos/bunraku/v1/*.proto) protos/generate.py .venv/ready
	$(RUN) protos/generate.py
	touch $@

demo: $(STUBS)
	bunraku animate --local --image $(IMAGE) --driving-video $(DRIVING) --prompt "$(PROMPT)" --output $(OUTPUT)

test: $(STUBS)
	$(RUN) -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: $(STUBS)
	$(RUN) -m pytest -m slow

# scores of the embedded default through its real services; some minutes
quality: $(STUBS)
	$(RUN) -m benchmarks.quality

check: $(STUBS)
	ruff format --check .
	ruff check .
	mypy
	buf lint protos

format: .venv/ready
	ruff format .
	ruff check --fix .

parity: $(STUBS)
	$(RUN) -m tests.parity $(GOLDENS) --device $(DEVICE) $(if $(MANIFESTS),--manifests $(MANIFESTS))

# certificates for mutual TLS on a machine of one's own: `bunraku serve --certificates certs`
certs: .venv/ready
	$(RUN) scripts/certificates.py certs

clean:
	rm -rf .venv bunraku/v1/*_pb2*
