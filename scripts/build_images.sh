#!/usr/bin/env bash
# Builds the images, and pushes them with PUSH=1: scripts/build_images.sh registry.example/bunraku 0.1.0
set -euo pipefail
cd "$(dirname "$0")/.."
registry=${1:?the registry and its folder}
tag=${2:?the tag}
for image in gateway encoder pose denoiser denoiser-kernels vae vae-kernels; do
    docker build --file docker/Dockerfile --target "$image" --tag "$registry/$image:$tag" \
        ${PYTHON_IMAGE:+--build-arg "PYTHON=$PYTHON_IMAGE"} .
    if [ "${PUSH:-0}" = 1 ]; then
        docker push "$registry/$image:$tag"
    fi
done
