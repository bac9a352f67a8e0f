#!/bin/sh
# Pin every dependency again, for every platform and with hashes; no index address is written.
# Usage: relock.sh path/to/uv
set -eu
uv=$1
locks=$(dirname "$0")
lock() {
  "$uv" pip compile pyproject.toml --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
    --no-emit-index-url --no-emit-find-links --no-header "$@"
}
lock -o "$locks/runtime.txt"
lock --extra local -c "$locks/runtime.txt" -o "$locks/local.txt"
lock --extra local --extra dev -c "$locks/local.txt" -o "$locks/dev.txt"
lock --extra local --extra dev --extra cdk -c "$locks/dev.txt" -o "$locks/cdk.txt"
