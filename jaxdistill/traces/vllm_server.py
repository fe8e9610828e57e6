"""Becomes vLLM's OpenAI-compatible server. Stands alone like `vllm_worker`, which lies beside it.

`servers` starts it by path (`python vllm_server.py JOB`), possibly with another environment's interpreter; JOB is JSON:

    {"arguments": {name: value}, "kv_cache_gib": 2, "rank": 0, "devices": 1}

stdin stays open as long as the parent lives; its end kills the server and all that it started.
"""

import json
import os
import sys


def main() -> None:
    import vllm_worker as worker  # pyrefly: ignore[missing-import]  # it lies beside this file

    worker.die_with_parent()  # holds after exec too
    worker.start_watchdog()
    job = json.loads(sys.argv[1])
    arguments = job["arguments"]
    if worker.is_cpu_build():
        worker.set_default(VLLM_CPU_KVCACHE_SPACE=job["kv_cache_gib"], OMP_WAIT_POLICY="PASSIVE")
        arguments |= worker.cpu_arguments(arguments.get("max_model_len") or 0)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices(job["rank"], job["devices"])
    worker.set_default(HF_HUB_OFFLINE=1, VLLM_NO_USAGE_STATS=1)
    module = "vllm.entrypoints.openai.api_server"  # vllm-cpu's console script looks for a package named vllm
    os.execv(sys.executable, [sys.executable, "-m", module, *flags(arguments)])


def devices(rank: int, each: int) -> str:
    """The accelerators of one of several servers, out of those that are visible."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(n) for n in range((rank + 1) * each)]
    if len(names) < (rank + 1) * each:
        sys.exit(f"ValueError: {len(names)} devices are too few for server {rank} with {each}; lower server.start")
    return ",".join(names[rank * each : (rank + 1) * each])


def flags(arguments: dict) -> list[str]:
    """vLLM's command line; what is None is left to vLLM."""
    found = []
    for name, value in arguments.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            found += [f"--{option}", str(value)]
    return found


if __name__ == "__main__":
    main()
