#!/usr/bin/env bash
# safetensors.numpy writes a transposed (or strided, or Fortran-ordered) array with its values in the wrong places, without a word.
#
# `save_file` takes the array's memory as it lies, and writes the shape of the view beside it. The file is valid and loads
# everywhere. safetensors.torch refuses such tensors by name; who converts a checkpoint with NumPy's `.T` gets a scrambled one.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3.11 -m venv env
env/bin/pip install --quiet --quiet safetensors==0.8.0 numpy==2.4.6

cat > program.py <<'PY'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

print("safetensors", safetensors.__version__, "numpy", np.__version__)
weights = np.arange(6, dtype=np.float32).reshape(2, 3)
arrays = {
    "as it is": weights,
    "transposed": weights.T,
    "Fortran order": np.asfortranarray(weights),
    "transposed, then ascontiguousarray": np.ascontiguousarray(weights.T),
}
same = {}
for name, array in arrays.items():
    save_file({"w": array}, "w.safetensors")
    read = load_file("w.safetensors")["w"]
    same[name] = np.array_equal(array, read)
    print(f"{name:36} given {array.tolist()}  read {read.tolist()}  {'same' if same[name] else 'OTHER VALUES'}")
expected = {"as it is": True, "transposed": False, "Fortran order": False, "transposed, then ascontiguousarray": True}
if same != expected:
    print("CHANGED: the behaviour is no longer as described")
    sys.exit(1)
PY
env/bin/python program.py
