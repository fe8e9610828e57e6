#!/usr/bin/env bash
# Everything that has to hold: ruff, the type checker (pyrefly) and pytest, in .venv, which is made if it is missing.
# Needs Python 3.11 or newer and a network, once.
#
#     bash tools/test.sh                              all of it; ends with pytest's summary
#     bash tools/test.sh ARGUMENTS FOR pytest         pytest alone, such as tests/losses -x, or -m "not vllm"
set -uo pipefail
cd "$(dirname "$0")/.." || exit
bash tools/install.sh dev || exit
unset PYTHONDONTWRITEBYTECODE # hundreds of processes import what is tested here

python=.venv/bin/python
[ $# -eq 0 ] || exec "$python" -m pytest "$@"

if [ ! -e .venv-vllm ] && ! compgen -G ".venv/lib/python3*/site-packages/vllm/__init__.py" >/dev/null; then
    echo "vLLM has no build for this machine; leaving its tests out."
    set -- -m "not vllm"
fi

failed=
check() { # check WHAT COMMAND...: all of them run, so that one call tells everything
    echo "== $1"
    shift
    "$@" || failed="$failed $3"
}
check "Style: ruff" "$python" -m ruff check .
check "Types: pyrefly" "$python" -m pyrefly check
# two at a time, a file's tests in one process, in their order: what shares a fixture stays together, quick ones come last
check "Tests: pytest" "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
[ -z "$failed" ] || { echo "Failed:$failed" >&2; exit 1; }
