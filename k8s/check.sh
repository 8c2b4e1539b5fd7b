#!/usr/bin/env bash
# Renders every overlay and lets checkov look at it, from an environment of its own: its pins would downgrade ours.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=build/checkov
if [ ! -x "$environment/bin/checkov" ]; then
    mkdir -p build
    python3 -m venv "$environment"
    "$environment/bin/pip" install --quiet --disable-pip-version-check checkov==3.3.30
fi
rendered=$(mktemp -d)
trap 'rm -rf "$rendered"' EXIT
for overlay in k8s/overlays/*/; do
    kubectl kustomize "$overlay" >"$rendered/$(basename "$overlay").yaml"
done
"$environment/bin/checkov" --config-file k8s/checkov.yaml --directory "$rendered"
