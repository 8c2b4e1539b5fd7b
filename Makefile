# Everything runs in .venv, which `setup` makes; the other targets call it when it is missing or out of date.
PYTHON ?= python3
RUN := .venv/bin/python
export PATH := $(CURDIR)/.venv/bin:$(PATH)

# `make demo IMAGE=... POSE_VIDEO=... OUTPUT=...` animates other pictures
IMAGE ?= examples/reference.png
POSE_VIDEO ?= examples/pose.mp4
PROMPT ?= a figure dances
OUTPUT ?= demo.mp4
# `make parity GOLDENS=directory MANIFESTS=directory`
GOLDENS ?= tests/goldens
MANIFESTS ?=

.PHONY: setup protos demo test test-slow check format parity bundle certs clean

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

# the small models of the embedded default, in the file formats of the real ones
bundle: bundles/tiny/ready

bundles/tiny/ready: training/write_tiny_bundle.py bundles/tiny/bundle.toml $(STUBS)
	$(RUN) -m training.write_tiny_bundle
	touch $@

demo: bundle
	bunraku animate --local --image $(IMAGE) --pose-video $(POSE_VIDEO) --prompt "$(PROMPT)" --output $(OUTPUT)

test: bundle
	$(RUN) -m pytest -m "not slow"

test-slow: bundle
	$(RUN) -m pytest -m slow

check: $(STUBS)
	ruff format --check .
	ruff check .
	mypy
	buf lint protos

format: .venv/ready
	ruff format .
	ruff check --fix .

parity: $(STUBS)
	$(RUN) -m tests.parity $(GOLDENS) $(if $(MANIFESTS),--manifests $(MANIFESTS))

# certificates for mutual TLS on a machine of one's own: `bunraku serve --certificates certs`
certs: .venv/ready
	$(RUN) scripts/certificates.py certs

clean:
	rm -rf .venv bundles/tiny/*.safetensors bundles/tiny/*.pth bundles/tiny/ready bunraku/v1/*_pb2*
