#!/usr/bin/env bash
# Everything that needs an H100, in parts of less than ten minutes: numerics, gates, speed and memory.
#   bash benchmarks/h100.sh [OUT]          in the container, or where torch (and Transformer Engine) are installed
#   bash benchmarks/h100.sh OUT --smoke    the same code on a CPU, in tiny shapes
# A part that fails does not stop the others; running it again continues the same results.json.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:-runs/h100}
python=${PYTHON:-python3}
[ -x .venv/bin/python ] && python=${PYTHON:-.venv/bin/python}
shift $(($# > 0 ? 1 : 0))

# What the recipes run with (recipes/cluster.py).
eval "$("$python" -c '
import os, shlex
from recipes.cluster import ENVIRONMENT
for name, value in ENVIRONMENT.items():
    print("export", name + "=" + shlex.quote(os.environ.get(name, value)))
')"

parts=$("$python" -m benchmarks.h100 --list --out "$out" "$@")
failed=0
for part in $parts; do
    timeout 600 "$python" -m benchmarks.h100 --part "$part" --out "$out" "$@" || {
        echo "part $part failed" >&2
        failed=1
    }
done
cat "$out/table.md"
exit $failed
