#!/usr/bin/env bash
# transformers 5: rope_scaling added to a config.json that transformers 5 saved resets rope_theta to 10,000, without a word.
#
# Model cards say to lengthen a context by adding `"rope_scaling": {...}` to config.json. In files of transformers 4 that keeps
# `rope_theta` beside it. Transformers 5 saves `rope_parameters` instead, with the base inside; a `rope_scaling` beside
# them replaces them whole, and the base falls back to the default: a Qwen or Llama checkpoint then computes other rotations everywhere.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3.11 -m venv env
env/bin/pip install --quiet --quiet transformers==5.19.0

cat > program.py <<'PY'
import json
import pathlib
import sys

import transformers
from transformers import AutoConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

print("transformers", transformers.__version__)
scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
bases = {}
for kind in (Qwen2Config, Qwen3Config, LlamaConfig, MistralConfig):
    name = kind.model_type
    saved = kind(rope_parameters={"rope_type": "default", "rope_theta": 1e6}, max_position_embeddings=32768)
    saved.save_pretrained(name)
    file = pathlib.Path(name) / "config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | {"rope_scaling": scaling}))
    new = AutoConfig.from_pretrained(name).rope_parameters["rope_theta"]
    # as transformers 4 wrote the same model
    del fields["rope_parameters"]
    file.write_text(json.dumps(fields | {"rope_theta": 1e6, "rope_scaling": scaling}))
    old = AutoConfig.from_pretrained(name).rope_parameters["rope_theta"]
    bases[name] = (old, new)
    print(f"{name:8} base 1,000,000; with rope_scaling added: in a file of version 4 {old:,.0f}, of version 5 {new:,.0f}")
if bases != dict.fromkeys(("qwen2", "qwen3", "llama", "mistral"), (1e6, 1e4)):
    print("CHANGED: the behaviour is no longer as described")
    sys.exit(1)
PY
env/bin/python program.py 2>&1 | grep -v "PyTorch was not found"
