"""How fast the JAX decoder is: against transformers' generate, and with continuous refill against whole batches.

    python tools/bench_decode.py                 both models, five repetitions, some minutes
    python tools/bench_decode.py --cores 1       both sides on one core: what can be compared on a busy machine
    python tools/bench_decode.py --small         a few tokens, to see that the tool runs

1. The same fp32 model, the same 32 random prompts of 32 tokens, 128 new tokens each, greedy, nothing stops: ours,
   and transformers with a static cache and with its default, dynamic one. Each side is a process of its own, torch with
   all cores; they take turns, and the medians are printed. The tokens must be equal; a row that is not is printed with
   how far apart the two logits were where it first differs.
2. 256 prompts of 4 to 32 tokens with 8 to 128 new ones: all in one call, whose 32 rows are refilled as they end,
   against 32 at a time, where the longest is waited for.

Compiling is not timed: every call is made once before. Models: the demo teacher, and a Qwen3 shape with random weights.
Threads that wait for each other take very much longer where other processes want the cores too, torch's above all:
results on a busy machine mean nothing, but for those on one core in tokens a second of that core's time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BATCH = 32
QWEN3 = {
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1152,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}
# how each side is called, and what it is asked
WAYS = {"jaxdistill": "ours", "transformers, static cache": "hf", "transformers, dynamic cache": "hf"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few tokens, to see that the tool runs")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="cores for each side (%(default)s)")
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.environ["HF_HUB_OFFLINE"] = "1"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    if arguments.child:
        os.environ["OMP_NUM_THREADS"] = str(arguments.cores)
        serve(*arguments.child)
        return 0
    tokens, prompts, repetitions = (12, 40, 1) if arguments.small else (128, 256, arguments.repetitions)
    print(f"{arguments.cores} of {os.cpu_count()} cores; load before: {os.getloadavg()[0]:.1f}")
    equal = True
    with tempfile.TemporaryDirectory() as folder:
        for name, path in {"demo teacher": ROOT / "jaxdistill/demo/teacher", "Qwen3, random": Path(folder)}.items():
            if path == Path(folder):
                make_random(path)
            equal &= compare(name, path, tokens, prompts, repetitions, arguments.cores)
    print(f"load after: {os.getloadavg()[0]:.1f}")
    return 0 if equal else 1


def compare(name: str, folder: Path, tokens: int, prompts: int, repetitions: int, cores: int) -> bool:
    """Prints what one model gave; False if outputs differ by more than a tie."""
    import numpy as np

    config = json.loads((folder / "config.json").read_text())
    rng = np.random.default_rng(0)
    fixed = rng.integers(3, config["vocab_size"], (BATCH, 32)).tolist()
    mixed = [rng.integers(3, config["vocab_size"], n).tolist() for n in rng.integers(4, 33, prompts)]
    limits = rng.integers(8, tokens + 1, prompts).tolist()
    sides = {side: Side(side, folder, cores) for side in ("ours", "hf")}
    try:
        c = config
        print(f"\n{name}: width {c['hidden_size']}, {c['num_hidden_layers']} layers, vocabulary {c['vocab_size']}, "
              f"{sides['hf'].ask({'do': 'size'}) / 1e6:.1f}M parameters, fp32, greedy")  # fmt: skip
        seconds: dict[str, list[list[float]]] = {way: [] for way in [*WAYS, "refill", "whole"]}
        outputs: dict[str, Any] = {}
        for turn in range(-1, repetitions):
            for way, side in WAYS.items():
                found = sides[side].ask({"do": "generate", "way": way, "prompts": fixed, "tokens": tokens})
                outputs[way] = found["ids"]
                seconds[way] += [found["seconds"]] if turn >= 0 else []
            for way in ("refill", "whole"):
                found = sides["ours"].ask({"do": "mixed", "way": way, "prompts": mixed, "limits": limits})
                outputs[way] = found["ids"]
                seconds[way] += [found["seconds"]] if turn >= 0 else []
        print(f"  {BATCH} rows, 32 + {tokens} tokens; medians of {repetitions}, lowest to highest")
        for way in WAYS:
            report(way, seconds[way], BATCH * tokens, seconds["jaxdistill"])
        print(f"  {prompts} prompts of 4 to 32 tokens, 8 to {tokens} new ones, {BATCH} rows")
        for way, text in (("refill", "rows are refilled"), ("whole", "whole batches")):
            report(text, seconds[way], sum(limits), seconds["refill"])
        same = outputs["refill"] == outputs["whole"]
        print(f"  refilled and whole batches: {'the same tokens' if same else 'NOT the same tokens'}")
        return equality(sides["hf"], fixed, outputs) and same
    finally:
        for side in sides.values():
            side.end()


def report(way: str, seconds: list[list[float]], tokens: int, reference: list[list[float]]) -> None:
    """A line of rates, by the clock and by the time that cores worked, and how many times as long as ours it takes."""
    (wall, cpu), (wall_0, cpu_0) = (map(statistics.median, zip(*x, strict=True)) for x in (seconds, reference))
    rates = sorted(tokens / wall for wall, _ in seconds)
    print(
        f"    {way:<28} {tokens / wall:7,.0f} tokens/s ({rates[0]:,.0f} to {rates[-1]:,.0f}), x {wall / wall_0:.2f}; "
        f"{tokens / cpu:7,.0f} a second of a core, x {cpu / cpu_0:.2f}"
    )


def equality(side: Side, prompts: list[list[int]], outputs: dict[str, Any]) -> bool:
    """Holds every way's tokens against ours; True if all differences are ties."""
    good = True
    for way in [way for way in WAYS if way != "jaxdistill"]:
        pairs = list(zip(prompts, outputs["jaxdistill"], outputs[way], strict=True))
        unequal = [(prompt, ours, theirs) for prompt, ours, theirs in pairs if ours != theirs]
        print(f"  {way}: {len(pairs) - len(unequal)} of {len(pairs)} rows have the very same tokens")
        for prompt, ours, theirs in unequal:
            at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            gap = side.ask({"do": "gap", "ids": prompt + ours[:at], "tokens": [ours[at], theirs[at]]})
            print(f"    one differs first at token {at}, whose logits are {gap:.1e} apart")
            good &= gap < 1e-4
    return good


class Side:
    """A process that has the model loaded, and answers one question at a time."""

    def __init__(self, side: str, folder: Path, cores: int):
        command = [sys.executable, __file__, "--cores", str(cores), "--child", side, str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, question: dict[str, Any]) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit("a side has died; its own message is above.")
        return json.loads(answer)

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(side: str, folder: str) -> None:
    answer = serve_ours(folder) if side == "ours" else serve_transformers(folder)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def now() -> tuple[float, float]:
    """Seconds by the clock, and seconds that this process has had of all cores."""
    return time.perf_counter(), time.process_time()


def serve_ours(folder: str) -> Any:
    from jaxdistill.generate import decode
    from jaxdistill.models import load_hf

    model = load_hf(folder)

    def generate(prompts: list[list[int]], limits: Any) -> list[list[int]]:
        options = {"max_tokens": limits, "temperature": 0.0, "stop_ids": [], "batch": BATCH}
        found = {i: ids for i, ids, _ in decode(model, prompts, [0] * len(prompts), **options)}
        return [found[i] for i in range(len(prompts))]

    def answer(q: dict[str, Any]) -> Any:
        prompts = q["prompts"]
        started = now()
        if q["do"] == "generate":
            ids = generate(prompts, q["tokens"])
        else:
            size = len(prompts) if q["way"] == "refill" else BATCH
            ids = []
            for start in range(0, len(prompts), size):
                ids += generate(prompts[start : start + size], q["limits"][start : start + size])
        return {"seconds": [b - a for a, b in zip(started, now(), strict=True)], "ids": ids}

    return answer


def serve_transformers(folder: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def answer(q: dict[str, Any]) -> Any:
        if q["do"] == "size":
            return sum(p.numel() for p in model.parameters())
        if q["do"] == "gap":
            logits = model(torch.tensor([q["ids"]])).logits[0, -1]
            return abs(float(logits[q["tokens"][0]] - logits[q["tokens"][1]]))
        ids = torch.tensor(q["prompts"])
        cache = {"cache_implementation": "static"} if "static" in q["way"] else {}
        started = now()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=q["tokens"], eos_token_id=None,
            pad_token_id=0, **cache,
        )  # fmt: skip
        return {"seconds": [b - a for a, b in zip(started, now(), strict=True)], "ids": out[:, ids.shape[1] :].tolist()}

    return answer


def make_random(folder: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**QWEN3)).save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
