#!/usr/bin/env bash
# Build the documentation site into site/; a warning (a broken link, a page outside of the navigation,
# a docstring that cannot be read) is an error.
#
#   bash scripts/docs.sh [--serve]     --serve: show it on http://127.0.0.1:8000 and follow edits
#
# RLPROMPT_VENV  the environment's folder, from the repository's root (default: .venv)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly PYTHON="${RLPROMPT_VENV:-.venv}/bin/python"
export NO_MKDOCS_2_WARNING=1 # Material's notice about a successor of MkDocs

case "${1:-}" in
  "") COMMAND=(build --strict) ;;
  --serve) COMMAND=(serve --strict) ;;
  *) printf 'usage: bash scripts/docs.sh [--serve]\n' >&2; exit 2 ;;
esac

bash scripts/setup.sh docs
exec "$PYTHON" -m mkdocs "${COMMAND[@]}"
