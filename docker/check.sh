#!/usr/bin/env bash
# Checks docker/: builds and runs the image if there is a Docker engine; otherwise runs what needs none (README.md).
#
#     docker/check.sh
#
# PYTHON (default: .venv/bin/python) runs the tests of the second case and has the project installed.
set -euo pipefail
cd "$(dirname "$0")/.."

if docker info > /dev/null 2>&1 && docker compose version > /dev/null 2>&1; then
    compose=(docker compose --project-name emkd-check --file docker/compose.yaml)
    trap '"${compose[@]}" --profile demo down --volumes' EXIT
    "${compose[@]}" config --quiet
    "${compose[@]}" build
    docker run --rm emkd:local --help
    test "$(docker run --rm --entrypoint id emkd:local --user)" != 0
    "${compose[@]}" up --exit-code-from demo demo
else
    echo "found no Docker engine with compose: running the tests that need none"
    exec "${PYTHON:-.venv/bin/python}" -m pytest tests/docker
fi
