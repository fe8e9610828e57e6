"""How fast traces are collected, held against the same vLLM driven bare with all prompts at once.

    python tools/bench_traces.py [--samples 2000] [--runs 1] [--max-num-seqs 256] [--folder FOLDER]
                                 [--skip-server] [--ray]

The demo teacher answers demo problems at temperature 1, seeded one by one, up to 96 tokens. Measured is from the first
request to the last token, without the start of the engine:

    bare      `LLM.generate` with the list of all prompts
    engine    traces.engine: vllm, the whole stage with its journal
    server    traces.engine: server with one server of our own, the whole stage
    ray       traces.engine: vllm with traces.executor: ray, one worker on this machine, the whole stage

Prints tokens a second and the share of bare, and the collector's largest resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill import config as configs
from jaxdistill import hub, tokenization
from jaxdistill.records import Problem, RunDir, read_records
from jaxdistill.traces import collect, vllm_engine
from jaxdistill.traces.engines import Sampling
from jaxdistill.traces.problems import problems
from jaxdistill.traces.work import Requests, WorkList

ROOT = Path(__file__).parent.parent


def make_config(folder: Path, name: str, engine: str, samples: int, max_num_seqs: int) -> configs.RunConfig:
    """Args: `engine` is a kind of the table above."""
    return configs.build(
        {
            "name": name,
            "run_dir": str(folder / name),
            "problems": {"source": "demo", "count": samples, "seed": 5},
            "traces": {
                "engine": "server" if engine == "server" else "vllm",
                "executor": "ray" if engine == "ray" else "local",
                "ray": {"workers": 1},
                "teacher": "demo",
                "max_tokens": 96,
                "server": {"start": int(engine == "server")},
                "vllm": {
                    "dtype": "float32",
                    "max_model_len": 256,
                    "enforce_eager": True,
                    "max_num_seqs": max_num_seqs,
                },
            },
            "data": {"row_tokens": 136},
            "student": {"init": "demo"},
            "train": {"batch_rows": 16, "steps": 1, "optimizer": {"learning_rate": 1e-3}},
        }
    )


def measure_stage(folder: Path, name: str, engine: str, samples: int, max_num_seqs: int) -> dict[str, Any]:
    """One run of the stage in this process."""
    config, run = make_config(folder, name, engine, samples, max_num_seqs), RunDir(folder / name)
    problems(config, run)
    counts = collect.generate(config, run)
    assert counts["finished"].get("error", 0) == 0, counts
    return counts


def measure_bare(folder: Path, samples: int, max_num_seqs: int) -> dict[str, Any]:
    """`LLM.generate` on the very same requests, with the very same arguments."""
    from jaxdistill.traces import vllm_worker

    config, run = make_config(folder, "bare", "bare", samples, max_num_seqs), RunDir(folder / "bare")
    problems(config, run)
    checkpoint = hub.demo_teacher()
    tokenizer = tokenization.load_tokenizer("demo")
    work = WorkList(config.traces, list(read_records(run.problems, Problem)), tokenizer)
    requests = Requests(work, np.arange(len(work)))
    stop_ids = tokenization.stop_ids(checkpoint, tokenizer)
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=96, stop_ids=stop_ids)
    longest = max(request.room for request in requests)
    job = vllm_engine.make_job(checkpoint, longest, sampling, config.traces.vllm)
    arguments = job["engine"]
    if vllm_worker.is_cpu_build():
        vllm_worker.set_default(VLLM_CPU_KVCACHE_SPACE=2, OMP_WAIT_POLICY="PASSIVE", VLLM_ENABLE_V1_MULTIPROCESSING=0)
        arguments |= vllm_worker.cpu_arguments(arguments["max_model_len"])
    from vllm import LLM

    engine = LLM(**arguments)
    prompts: list[Any] = [{"prompt_token_ids": request.prompt_ids} for request in requests]
    parameters = [vllm_worker.sampling_params(job["sampling"], request.seed) for request in requests]
    begun = time.monotonic()
    outputs = engine.generate(prompts, parameters, use_tqdm=False)
    seconds = time.monotonic() - begun
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {"output_tokens": tokens, "tokens_per_second": round(tokens / seconds, 1)}


def in_a_process(kind: str, folder: Path, arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Each measurement has a process of its own, so that none pays for another's memory."""
    out = folder / f"{name}.json"
    options = ["--samples", str(arguments.samples), "--max-num-seqs", str(arguments.max_num_seqs)]
    command = [sys.executable, __file__, "--kind", kind, "--name", name, "--folder", str(folder), *options]
    with open(folder / f"{name}.log", "wb") as log:
        ran = subprocess.run(command, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    if ran.returncode:
        raise ValueError(f"{kind} failed; see {folder / f'{name}.log'}")
    return json.loads(out.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=1, help="of each kind, in turn; the best counts")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="a temporary folder if absent")
    parser.add_argument("--skip-server", action="store_true")
    parser.add_argument("--ray", action="store_true", help="also on a Ray cluster of this machine")
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--name", default="run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.kind:
        size = (arguments.samples, arguments.max_num_seqs)
        if arguments.kind == "bare":
            found = measure_bare(folder, *size)
        else:
            found = measure_stage(folder, arguments.name, arguments.kind, *size)
        found["memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        (folder / f"{arguments.name}.json").write_text(json.dumps(found))
        return 0
    kinds = ["bare", "engine", *(["server"] * (not arguments.skip_server)), *(["ray"] * arguments.ray)]
    best: dict[str, dict[str, Any]] = {}
    for number in range(arguments.runs):
        for kind in kinds:
            found = in_a_process(kind, folder, arguments, f"{kind}-{number}")
            if kind not in best or found["tokens_per_second"] > best[kind]["tokens_per_second"]:
                best[kind] = found
    for kind, found in best.items():
        share = found["tokens_per_second"] / best["bare"]["tokens_per_second"]
        print(
            f"{kind:<8}{found['tokens_per_second']:>10,.0f} tokens/s{share:>8.1%} of bare"
            f"{found['output_tokens']:>10,} tokens{found['memory_mib']:>8,} MiB"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
