#!/usr/bin/env bash
# AutoTokenizer of transformers 5 splits a qwen2 checkpoint's texts as Qwen does, whatever tokenizer.json and tokenizer_class say.
#
# A student of a Qwen2 shape with a byte-level tokenizer of its own: `tokenizers` takes the pre-tokenizer of tokenizer.json,
# AutoTokenizer puts Qwen's in its place by config.json's model_type. Every text still decodes to itself, so that nothing looks
# wrong, but the ids are not those of the file. `tokenizer_class: TokenizersBackend` in tokenizer_config.json prevents it for qwen3 and not for
# qwen2; beside llama, mistral and gpt2 the same files need nothing.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3.11 -m venv env
env/bin/pip install --quiet --quiet transformers==5.19.0 tokenizers==0.23.3

cat > program.py <<'PY'
import json
import pathlib
import sys

import tokenizers
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
own = Tokenizer(models.BPE())
own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
own.decoder = decoders.ByteLevel()
sentence = "The train has 60 seats. How many seats has a train of 4812 wagons? It doesn't say."
alphabet = pre_tokenizers.ByteLevel.alphabet()
own.train_from_iterator(
    [sentence] * 50, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
)
text = "Has the train 60 seats or 4812? It doesn't say."
ids = own.encode(text).ids
print(f"tokenizers alone: {len(ids)} ids")


def read(model_type, settings):
    folder = pathlib.Path(f"{model_type}-{len(settings)}")
    folder.mkdir()
    own.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = tokenizer(text, add_special_tokens=False).input_ids
    same = "the same" if found == ids else "OTHERS"
    print(f"{model_type:8} {str(settings):42} {type(tokenizer).__name__:18} {len(found)} ids, {same}")
    assert tokenizer.decode(found) == text
    return found == ids


named = {"tokenizer_class": "TokenizersBackend"}
seen = {kind: (read(kind, {}), read(kind, named)) for kind in ("qwen2", "qwen3", "llama", "mistral", "gpt2")}
expected = dict.fromkeys(seen, (True, True)) | {"qwen2": (False, False), "qwen3": (False, True)}
if seen != expected:
    print("CHANGED: the behaviour is no longer as described")
    sys.exit(1)
PY
env/bin/python program.py 2>&1 | grep -v "PyTorch was not found"
