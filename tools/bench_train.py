"""Training throughput beside TRL and Tunix: the same Qwen3 shape, the same GSM8K examples, one after the other.

    python tools/bench_train.py --gsm8k data/gsm8k/train.jsonl                     all contenders, fp32 and bf16
    python tools/bench_train.py --gsm8k ... --only ours tunix --dtypes float32 --steps 10
    python tools/bench_train.py --gsm8k ... --only ours trl --micro-batches 4      a step in four parts

Every contender is a fresh process and trains as its users would have it: jaxdistill through its own stage `train` on
packed rows, TRL's SFTTrainer with completion-only loss on padded batches, Tunix's PeftTrainer with a response mask on
batches padded to the longest example. 16 rows or examples a step, AdamW, loss on responses alone. Tokens are counted
where they are real: prompt and response, no padding. The first steps, which compile, are not timed.
`stolen` is the share of the processors' time that a virtual machine's host gave to others meanwhile: figures with more
than a few percent of it say nothing.
TRL and Tunix get environments of their own (`--peers`, made on the first call), for their requirements exclude ours.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEERS = {"trl": ["torch==2.13.0", "trl==1.16.0"], "tunix": ["google-tunix==0.1.7"]}
SHAPE = {
    "model_type": "qwen3",
    "hidden_size": 384,
    "intermediate_size": 1152,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
VOCABULARY = 4096
BATCH = 16
WARMUP = 3
"""Steps at the start that are not timed."""
LEARNING_RATE = 3e-4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, help="GSM8K's train.jsonl")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_train"), help="where rows are kept (%(default)s)")
    parser.add_argument("--peers", type=Path, default=Path("runs/bench_train/peers"), help="their environments")
    parser.add_argument("--only", nargs="+", choices=["ours", *PEERS], default=["ours", *PEERS])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--row-tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each contender (%(default)s)")
    parser.add_argument("--micro-batches", type=int, help="parts of a step, ours and TRL's; each its default if absent")
    parser.add_argument("--child", nargs=2, metavar=("NAME", "DTYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.child and arguments.micro_batches and "tunix" in arguments.only:
        parser.error("Tunix is not measured in parts of a step; leave it out: --only ours trl.")
    if arguments.child:
        name, dtype = arguments.child
        run = {"ours": run_ours, "trl": run_trl, "tunix": run_tunix}[name]
        parts = {} if name == "tunix" else {"micro_batches": arguments.micro_batches}
        found = run(arguments.work.resolve(), dtype, arguments.steps, **parts)
        found["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
        print(json.dumps(found))
        return 0
    sys.path.insert(0, str(ROOT))
    prepare(arguments)
    print(
        f"{'':<8}{'dtype':<10}{'real tokens/s':>14}{'padding':>9}{'s/step':>8}{'peak GiB':>10}{'loss':>12}{'stolen':>8}"
    )
    results: dict[tuple[str, str], dict[str, Any]] = {}
    for dtype in arguments.dtypes:
        for name in arguments.only:
            results[name, dtype] = found = child(name, dtype, arguments)
            print(
                f"{name:<8}{dtype:<10}{found['tokens_per_second']:>14,.0f}{found['padding']:>9.1%}"
                f"{found['seconds_per_step']:>8.2f}{found['peak_gib']:>10.2f}"
                f"{found['first_loss']:>6.2f}->{found['last_loss']:.2f}{found['stolen']:>8.1%}",
                flush=True,
            )
        peers = [results[n, dtype]["tokens_per_second"] for n in arguments.only if n != "ours"]
        if "ours" in arguments.only and peers:
            print(f"{dtype}: {results['ours', dtype]['tokens_per_second'] / max(peers):.2f} x the faster peer")
    return 0


def prepare(arguments: argparse.Namespace) -> None:
    """Packs GSM8K's human solutions with our stages, and writes the very same examples unpacked for the others."""
    import numpy as np

    from jaxdistill import pipeline
    from jaxdistill.config import load
    from jaxdistill.data.rows import Batches
    from jaxdistill.records import RunDir

    work = arguments.work.resolve()
    path = work / "config.yaml"
    if not (work / "examples.npz").is_file():
        if arguments.gsm8k is None:
            raise SystemExit("bench_train: --gsm8k names GSM8K's train.jsonl; it is needed once.")
        work.mkdir(parents=True, exist_ok=True)
        config = {
            "name": "bench",
            "run_dir": str(work / "run"),
            "problems": {"source": "gsm8k", "path": str(arguments.gsm8k.resolve())},
            "traces": {"engine": "import"},
            "data": {"row_tokens": arguments.row_tokens, "overlong": "drop"},
            "student": {"tokenizer": "train", "tokenizer_vocab": VOCABULARY, "architecture": SHAPE},
            "train": {
                "batch_rows": BATCH,
                "steps": 1,
                "optimizer": {"name": "adamw", "learning_rate": LEARNING_RATE, "schedule": "constant"},
            },
        }
        path.write_text(json.dumps(config))
        for command in ("generate", "verify", "prepare"):
            pipeline.run_command(command, load(str(path), []))
        batches = Batches(RunDir(work / "run").tokens, batch_rows=BATCH, seed=0)
        tokens, trained, ends = [], [], []
        for index in range(batches.rows):
            row = batches.stored_row(index)
            for segment in range(1, int(row["segment_ids"].max()) + 1):
                mine = row["segment_ids"] == segment
                tokens.append(row["tokens"][mine])
                trained.append(row["regions"][mine] > 0)
                ends.append(len(tokens[-1]))
        np.savez(
            work / "examples.npz", tokens=np.concatenate(tokens), trained=np.concatenate(trained), ends=np.cumsum(ends)
        )
    for peer in set(arguments.only) & set(PEERS):
        folder = arguments.peers.resolve() / peer
        if not (folder / "bin" / "python").is_file():
            print(f"installing {peer} into {folder}", flush=True)
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            subprocess.run([str(folder / "bin" / "python"), "-m", "pip", "install", "-q", *PEERS[peer]], check=True)


def child(name: str, dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    python = sys.executable if name == "ours" else str(arguments.peers.resolve() / name / "bin" / "python")
    call = [python, str(Path(__file__).resolve()), "--child", name, dtype, "--work", str(arguments.work.resolve())]
    from jaxdistill.cli import MEMORY

    parts = ["--micro-batches", str(arguments.micro_batches)] if arguments.micro_batches else []
    environment = MEMORY | os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    before = processor_time()
    done = subprocess.run(
        [*call, "--steps", str(arguments.steps), *parts],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"bench_train: {name} {dtype} failed:\n{done.stderr[-3000:]}")
    passed, stolen = (b - a for a, b in zip(before, processor_time(), strict=True))
    return json.loads(done.stdout.splitlines()[-1]) | {"stolen": stolen / max(passed, 1)}


def processor_time() -> tuple[int, int]:
    """(all of it, what the host gave to others) since the system began, in ticks; zeros where Linux does not say."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return 0, 0
    # user, nice, system, idle, iowait, irq, softirq, steal; what follows is part of the first
    ticks = [int(x) for x in stat.read_text().splitlines()[0].split()[1:9]]
    return sum(ticks), ticks[7]


def report(tokens: int, positions: int, seconds: float, steps: int, losses: list[float]) -> dict[str, Any]:
    return {
        "tokens_per_second": tokens / seconds,
        "padding": 1 - tokens / positions,
        "seconds_per_step": seconds / steps,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def examples(work: Path) -> list[tuple[Any, Any]]:
    """(tokens, trained or not) of every example, in an order that all contenders share."""
    import numpy as np

    stored = np.load(work / "examples.npz")
    cuts = stored["ends"][:-1]
    found = list(zip(np.split(stored["tokens"], cuts), np.split(stored["trained"], cuts), strict=True))
    order = np.random.default_rng(0).permutation(len(found))
    return [found[i] for i in order]


def run_ours(work: Path, dtype: str, steps: int, micro_batches: int | None) -> dict[str, Any]:
    import shutil

    sys.path.insert(0, str(ROOT))
    from jaxdistill import pipeline
    from jaxdistill.config import load
    from jaxdistill.records import RunDir

    run = RunDir(work / "run")
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    config = load(
        str(work / "config.yaml"),
        [
            f"train.steps={WARMUP + steps}",
            f"train.compute_dtype={dtype}",
            f"train.micro_batches={micro_batches or 'null'}",
            "train.log_every=1",
        ],
    )
    pipeline.run_command("train", config)
    lines = [json.loads(line) for line in (run.checkpoints / "metrics.jsonl").read_text().splitlines()]
    # the line of a step is written after the next has begun; seconds add up over lines
    begin, end = lines[WARMUP - 1], lines[-1]
    tokens, seconds = end["tokens"] - begin["tokens"], end["seconds"] - begin["seconds"]
    positions = steps * BATCH * config.data.row_tokens
    return report(tokens, positions, seconds, steps, [line["loss"] for line in lines])


def run_trl(work: Path, dtype: str, steps: int, micro_batches: int | None) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(work / "run" / "tokenizer")
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, vocab_size=len(tokenizer)))
    rows = [{"input_ids": t.tolist(), "completion_mask": m.astype(int).tolist()} for t, m in examples(work)]
    settings = SFTConfig(
        output_dir=str(work / "trl"),
        per_device_train_batch_size=BATCH // (micro_batches or 1),
        gradient_accumulation_steps=micro_batches or 1,
        max_steps=WARMUP + steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        use_cpu=True,
        bf16=dtype == "bfloat16",
        gradient_checkpointing=False,  # its default trades time for memory that nobody misses here
        completion_only_loss=True,
        max_length=None,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
    )
    seen: dict[str, Any] = {"tokens": 0, "positions": 0, "losses": []}

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            if state.global_step == WARMUP:
                seen.update(tokens=0, positions=0, begin=time.monotonic())
            seen["end"], seen["now"] = time.monotonic(), (seen["tokens"], seen["positions"])

        def on_log(self, args, state, control, logs=None, **more):
            if logs and "loss" in logs:
                seen["losses"].append(float(logs["loss"]))

    class Counted(SFTTrainer):
        def training_step(self, model, inputs, *more, **others):
            seen["tokens"] += int(inputs["attention_mask"].sum())
            seen["positions"] += inputs["attention_mask"].numel()
            return super().training_step(model, inputs, *more, **others)

    trainer = Counted(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    tokens, positions = seen["now"]
    return report(tokens, positions, seen["end"] - seen["begin"], steps, seen["losses"])


def run_tunix(work: Path, dtype: str, steps: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx
    from tunix.models.qwen3 import model as qwen3
    from tunix.sft import peft_trainer, utils

    found = examples(work)
    longest = max(len(tokens) for tokens, _ in found)
    vocabulary = json.loads((work / "run" / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    shape = qwen3.ModelConfig(
        num_layers=SHAPE["num_hidden_layers"],
        vocab_size=max(VOCABULARY, len(vocabulary)),
        embed_dim=SHAPE["hidden_size"],
        hidden_dim=SHAPE["intermediate_size"],
        num_heads=SHAPE["num_attention_heads"],
        head_dim=SHAPE["head_dim"],
        num_kv_heads=SHAPE["num_key_value_heads"],
        rope_theta=int(SHAPE["rope_theta"]),
        norm_eps=SHAPE["rms_norm_eps"],
        use_tied_embedding=True,
        dtype=jnp.dtype(dtype),
    )
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        model = qwen3.Qwen3(shape, rngs=nnx.Rngs(0))
    seen: dict[str, Any] = {"tokens": 0, "losses": []}

    def batches():
        for step in range(WARMUP + steps):
            part = found[step * BATCH : (step + 1) * BATCH]
            tokens = np.zeros((BATCH, longest), np.int32)
            real, trained = np.zeros((BATCH, longest), bool), np.zeros((BATCH, longest), bool)
            for row, (ids, mask) in enumerate(part):
                tokens[row, : len(ids)], real[row, : len(ids)], trained[row, : len(ids)] = ids, True, mask
            if step == WARMUP:
                seen.update(tokens=0, begin=time.monotonic())
            seen["tokens"] += int(real.sum())
            yield {"tokens": tokens, "real": real, "trained": trained}

    def inputs(batch):
        real = jnp.asarray(batch["real"])
        return {
            "input_tokens": jnp.asarray(batch["tokens"]),
            "input_mask": jnp.asarray(batch["trained"]),
            "positions": utils.build_positions_from_mask(real),
            "attention_mask": utils.make_causal_attn_mask(real),
        }

    settings = peft_trainer.TrainingConfig(
        eval_every_n_steps=10**6, max_steps=WARMUP + steps, max_inflight_computations=1
    )
    trainer = peft_trainer.PeftTrainer(model, optax.adamw(LEARNING_RATE), settings).with_gen_model_input_fn(inputs)
    loss_fn = trainer.loss_fn

    @functools.wraps(loss_fn)  # flax reads the signature
    def watched(*args, **more):
        loss = loss_fn(*args, **more)
        jax.debug.callback(lambda x: seen["losses"].append(float(x)), loss)
        return loss

    trainer = trainer.with_loss_fn(watched)
    with jax.set_mesh(mesh):
        trainer.train(batches())
    jax.block_until_ready(nnx.state(model))
    seconds = time.monotonic() - seen["begin"]
    return report(seen["tokens"], steps * BATCH * longest, seconds, steps, seen["losses"])


if __name__ == "__main__":
    sys.exit(main())
