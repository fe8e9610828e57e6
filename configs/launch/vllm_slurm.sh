#!/usr/bin/env bash
# One vLLM server a node, and the collector beside the first, on a SLURM cluster. Unmeasured: no cluster was at hand.
#
#     sbatch configs/launch/vllm_slurm.sh my.yaml          any number of times: what is there is never drawn again
#
# The config has `traces: {engine: server, ...}`, without `server.urls`, and a run_dir that all nodes see. MODEL has to be
# the teacher of the config. Hardware: as many GPUs a node as the model needs (Qwen3-32B in bf16: 2 of 80 GB).
#SBATCH --job-name=traces
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=2
#SBATCH --time=24:00:00
#SBATCH --signal=B:INT@120
#SBATCH --requeue
set -euo pipefail
config=${1:?name the config: sbatch configs/launch/vllm_slurm.sh my.yaml}
MODEL=${MODEL:-Qwen/Qwen3-32B}
PORT=${PORT:-8000}
LENGTH=${LENGTH:-16384}
VLLM_PYTHON=${VLLM_PYTHON:-python}

# started again if it dies: the collector waits for it, and draws what was in flight once more
srun --kill-on-bad-exit=0 bash -c "
    while true; do
        $VLLM_PYTHON -m vllm.entrypoints.openai.api_server --model '$MODEL' --host 0.0.0.0 --port '$PORT' \
            --tensor-parallel-size \"\$SLURM_GPUS_ON_NODE\" --max-model-len '$LENGTH' --enable-prefix-caching \
            --generation-config vllm --disable-log-stats --uvicorn-log-level warning || true
        sleep 5
    done" &
servers=$!

urls=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s#.*#http://&:$PORT/v1#" | paste -sd,)
jaxdistill generate "$config" --set "traces.server.urls=[$urls]" --set traces.server.patience_s=1800 &
collector=$!
# two minutes before the time is up SLURM sends SIGINT here: the collector ends cleanly, and the job comes back
trap 'kill -INT $collector; wait $collector || true; kill $servers; scontrol requeue "$SLURM_JOB_ID"; exit 0' INT
wait $collector
kill $servers
