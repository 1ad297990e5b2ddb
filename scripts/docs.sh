#!/usr/bin/env bash
# Builds the documentation site into build/docs; every warning is an error.  Needs pip install ".[docs]".
# --no-notebooks: without executing the notebooks, which need the default checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "${1:-}" = --no-notebooks ] && export NPLLM_DOCS_NOTEBOOKS=off
rm -rf docs/api
sphinx-apidoc -q --separate --templatedir docs/templates --no-toc -o docs/api npllm
sphinx-build -b html -d build/doctrees -E -W --keep-going -n -q docs build/docs
echo "build/docs/index.html"
