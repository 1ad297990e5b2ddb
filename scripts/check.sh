#!/usr/bin/env bash
# What CI checks.  --style: ruff and mypy only.  --all: the slow groups as well.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff check .
mypy
[ "${1:-}" = --style ] && exit 0
exec pytest -n 2 --dist worksteal "$@"
