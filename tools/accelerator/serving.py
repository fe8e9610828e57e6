"""The machine's facts, the pipeline from problems to report, decoding, and whether runs repeat themselves."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from accelerator.common import ROOT, free_device, packed_rows, say, shape_of, short
from accelerator.training import prepared, random_like

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "torch", "liger-kernel", "grain")


def facts(tiny: bool) -> None:
    import jax

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "missing"

    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    versions = ", ".join(f"{p} {version(p)}" for p in PACKAGES)
    say(
        name=f"{device.device_kind}, {len(jax.devices())} device(s), Python {sys.version.split()[0]}",
        note=versions,
        device=device.device_kind,
        memory_gib=stats.get("bytes_limit", 0) / 2**30 or None,
        cudnn=_cudnn(device.platform),
    )


def _cudnn(platform: str) -> str | None:
    if platform != "gpu":
        return None
    try:
        private = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
        return str(private.check_cudnn_version())
    except Exception as error:
        return short(error)


def overrides(run_dir: Path, tiny: bool) -> list[str]:
    """The quickstart, shorter, with the embedded engine."""
    problems, held_out = (96, 8) if tiny else (1024, 128)
    return [
        f"run_dir={run_dir}", "traces.engine=jax", f"problems.count={problems}", f"evaluate.problems.count={held_out}",
        "train.epochs=1", "baselines={}", "train.checkpoint_every=8",
    ]  # fmt: skip


def pipeline(folder: Path, tiny: bool) -> None:
    """`jaxdistill run`: it is right if there is an export, an evaluation and a report."""
    run_dir = folder / "pipeline"
    command = [sys.executable, "-m", "jaxdistill", "run", str(ROOT / "configs/quickstart.yaml")]
    for override in overrides(run_dir, tiny):
        command += ["--set", override]
    begun = time.perf_counter()
    ran = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - begun
    ends = ("export/config.json", "evaluation/manifest.json", "report/index.html")
    missing = [path.split("/")[0] for path in ends if not (run_dir / path).is_file()]
    score = re.search(r"student\s+([\d.]+%) of", ran.stdout)
    if ran.returncode or missing:
        say(name="problems to report", seconds=seconds, failed=reason(ran, missing))
        return
    say(
        name="problems to report", seconds=seconds,
        note=f"exported, evaluated, reported; student {score[1] if score else '?'}",
    )  # fmt: skip


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def reason(ran: subprocess.CompletedProcess[str], missing: list[str]) -> str:
    """Why a command failed, in a line; a missing package by its name."""
    text = ran.stderr + ran.stdout
    package = re.search(r"No module named '([\w]+)", text)
    if package:
        return f"the package {package[1]} is missing"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    ended = f"no {', '.join(missing)}; " if missing else ""
    return f"{ended}exit code {ran.returncode}: {lines[-1][:300] if lines else 'it said nothing'}"


def decode(name: str, tiny: bool) -> None:
    """64 prompts of 128 tokens, 256 new ones each, greedy, bf16: by the JAX decoder."""
    import jax
    import jax.numpy as jnp

    from jaxdistill.generate import decode as generate
    from jaxdistill.models import ModelConfig, abstract_model, params_of
    from jaxdistill.models.load import with_params

    config = ModelConfig.from_hf(shape_of(name, tiny), name)
    model = abstract_model(config, dtype="bfloat16")
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=where), params_of(model))
    model = with_params(model, random_like(shapes))
    rows, prompt, new = (4, 8, 20) if tiny else (64, 128, 256)
    prompts = packed_rows(rows, prompt, config.vocab_size, 1)["tokens"].tolist()
    options: dict[str, Any] = {"max_tokens": new, "temperature": 0.0, "stop_ids": [], "batch": rows}
    for _ in range(2):  # the first one compiles
        begun = time.perf_counter()
        tokens = sum(len(ids) for _, ids, _ in generate(model, prompts, [0] * rows, **options))
        seconds = time.perf_counter() - begun
    say(ms=1e3 * seconds / new, tokens_per_second=tokens / seconds, note="ms are of a token step, prefill included")


def hugging_face_decode(name: str, tiny: bool) -> None:
    """The same by transformers' `generate`, with a static cache."""
    import torch
    import transformers

    where = free_device()
    rows, prompt, new = (4, 8, 20) if tiny else (64, 128, 256)
    config = transformers.Qwen3Config(**shape_of(name, tiny), attn_implementation="sdpa")
    torch.manual_seed(0)
    with torch.device(where):
        model = transformers.Qwen3ForCausalLM(config).to(torch.bfloat16).eval()
    ids = torch.tensor(packed_rows(rows, prompt, config.vocab_size, 1)["tokens"], dtype=torch.long, device=where)
    with torch.no_grad():
        for _ in range(2):
            begun = time.perf_counter()
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, min_new_tokens=new,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
            assert out.shape[1] == prompt + new
            seconds = time.perf_counter() - begun  # `generate` has looked at every token
    say(ms=1e3 * seconds / new, tokens_per_second=rows * new / seconds, note="dynamic cache")


def repeats(deterministic: bool, tiny: bool) -> None:
    """Two trainings of three steps from one seed: the same bits?"""
    import jax
    import numpy as np

    prints = []
    for _ in range(2):
        made, state, frozen, batch = prepared("Qwen3-0.6B", 2, "full", None, tiny, deterministic)
        for _ in range(3):
            state, metrics = made.step(state, batch, frozen, None)
        digest = hashlib.sha256()
        for x in jax.tree.leaves(state["params"]):
            digest.update(np.asarray(jax.device_get(x)).tobytes())
        prints.append((digest.hexdigest()[:16], float(metrics["loss"])))
        del state
    same = prints[0] == prints[1]
    say(same=same, note=f"two runs of three steps: {'the same bits' if same else 'other bits'}", loss=prints[0][1])


def resume(folder: Path, tiny: bool) -> None:
    """A training that is killed and goes on, against an undisturbed one, both with `train.deterministic`."""
    if (folder / "pipeline").is_dir():  # its traces and rows are what is needed here, too
        left = shutil.ignore_patterns("checkpoints", "export", "evaluation", "report")
        shutil.copytree(folder / "pipeline", folder / "resume" / "undisturbed", ignore=left)
    tool = str(ROOT / "tools/kill_test_train.py")
    command = [sys.executable, tool, "--kills", "1", "--folder", str(folder / "resume")]
    # the tool names the run folders itself
    for override in [*overrides(folder, tiny)[1:], "train.deterministic=true"]:
        command += ["--set", override]
    begun = time.perf_counter()
    ran = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    same = ran.returncode == 0
    last = ran.stdout.strip().splitlines()[-1:] or [""]
    say(
        name="killed and resumed", seconds=time.perf_counter() - begun, same=same, note=last[0] if same else None,
        failed=None if same else reason(ran, []),
    )  # fmt: skip
