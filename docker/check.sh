#!/usr/bin/env bash
# Checks docker/: with a Docker engine by building and running, without one as far as that goes (README.md).
#
#     docker/check.sh [--no-cluster] [--demo] [--keep FOLDER] [--base-python PYTHON]
#
# Options are for the second case. PYTHON (default: .venv/bin/python) runs the checks and has the project
# installed; --base-python stands for the image's Python, and must be of the same minor version.
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
    echo "no Docker engine with compose is at hand: checking what can be checked without"
    PYTHONPATH=docker exec "${PYTHON:-.venv/bin/python}" -m image_checks "$@"
fi
