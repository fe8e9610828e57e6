#!/usr/bin/env bash
# Generation and verification on a Ray cluster inside one SLURM job: Ray on every node, the driver on the first.
# Unmeasured: no cluster was at hand.
#
#     sbatch configs/launch/ray_slurm.sh my.yaml          any number of times: what is there is never drawn again
#
# The config has `traces: {executor: ray, ray: {address: auto, num_gpus: 2}}`, with num_gpus what the teacher needs
# (vllm.tensor_parallel_size), `verify: {executor: ray, ray: {address: auto}}`, and a run_dir that all nodes see, as the
# teacher's checkpoint. Hardware: as many GPUs a node as the model needs (Qwen3-32B in bf16: 2 of 80 GB).
#SBATCH --job-name=traces
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:INT@120
#SBATCH --requeue
set -euo pipefail
config=${1:?name the config: sbatch configs/launch/ray_slurm.sh my.yaml}
PORT=${PORT:-6379}
export RAY_USAGE_STATS_ENABLED=0

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
srun --overlap --nodes=1 --ntasks=1 -w "$head" \
    ray start --head --node-ip-address="$head" --port="$PORT" --include-dashboard=false --block &
ray=$!
sleep 20
if [ "${#nodes[@]}" -gt 1 ]; then
    srun --overlap --nodes=$((${#nodes[@]} - 1)) --ntasks-per-node=1 --exclude="$head" \
        ray start --address="$head:$PORT" --block &
    ray="$ray $!"
fi

# whoever has a place begins; nodes that join later get workers too
jaxdistill generate "$config" --set traces.ray.address="$head:$PORT" --set traces.ray.wait_s=600 &
driver=$!
# two minutes before the time is up SLURM sends SIGINT here: the driver ends cleanly, and the job comes back
trap 'kill -INT $driver; wait $driver || true; kill $ray; scontrol requeue "$SLURM_JOB_ID"; exit 0' INT
wait $driver
jaxdistill verify "$config" --set verify.ray.address="$head:$PORT" &
driver=$!
wait $driver
kill $ray
