#!/usr/bin/env bash
# From nothing to a distilled student: installs what is missing into .venv, then runs configs/quickstart.yaml.
# Needs Python 3.11 or newer and a network, once. Interrupted? The same command goes on where it stopped.
#
#     bash tools/quickstart.sh [ARGUMENTS FOR `jaxdistill run`]      such as --set train.epochs=1
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/install.sh run

if [ -x .venv-vllm/bin/python ]; then
    export JAXDISTILL_VLLM_PYTHON=$PWD/.venv-vllm/bin/python
elif ! compgen -G ".venv/lib/python3*/site-packages/vllm/__init__.py" >/dev/null; then
    echo "vLLM has no build for this machine; the teacher is decoded with JAX instead (--set traces.engine=jax)."
    set -- --set traces.engine=jax --set export.serve=false "$@"
fi

exec .venv/bin/python -m jaxdistill run configs/quickstart.yaml "$@"
