#!/usr/bin/env bash
# Calling a transformers tokenizer once with truncation and padding changes the tokenizer.json that it saves later: the tokenizers library then cuts and pads every text.
#
# The call leaves its limits in the tokenizer; save_pretrained writes them. AutoTokenizer resets them at its next call, so
# only readers of the file itself (tokenizers in Python or Rust, and servers built on it) lose the ends of long prompts.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3.11 -m venv env
env/bin/pip install --quiet --quiet transformers==5.24.0 tokenizers==0.23.3

cat > program.py <<'PY'
import sys

import tokenizers
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

VOCABULARY = ["<pad>", "<unk>", "a", "b", "c", "d", "e"]
TEXTS = ["a b c d e", "a"]
EXPECTED = [[2, 3, 4, 5, 6], [2]]


def read(folder):
    """Ids of TEXTS by the saved file's two readers: tokenizers and transformers."""
    plain = Tokenizer.from_file(f"{folder}/tokenizer.json")
    auto = AutoTokenizer.from_pretrained(folder)
    return [plain.encode(text).ids for text in TEXTS], [auto(text)["input_ids"] for text in TEXTS]


words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")

tokenizer.save_pretrained("before")
tokenizer("a b c d e", truncation=True, max_length=3, padding="max_length")
tokenizer.save_pretrained("after")

print(f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}")
print(f"texts {TEXTS}, expected from every saved file: {EXPECTED}")
before, after = read("before"), read("after")
for when, (plain, auto) in {"before": before, "after": after}.items():
    print(f"  saved {when} the call: tokenizers {plain}, AutoTokenizer {auto}")
if before != (EXPECTED, EXPECTED) or after != ([[2, 3, 4], [2, 0, 0]], EXPECTED):
    sys.exit("CHANGED: the saved files are not read as described")
print("as described: the file saved after the call cuts at 3 tokens and pads to 3, for tokenizers alone")
PY
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error env/bin/python -I program.py
