#!/usr/bin/env bash
# Training on several hosts under SLURM: one process a host, each with all of its GPUs; the processes find each other.
#
#     sbatch configs/launch/slurm.sh my.yaml
#
# Before: `jaxdistill generate`, `verify` and `prepare` on one host. After: `jaxdistill export`, `evaluate`, `report`.
# The run's folder must be on a file system that every host sees. SLURM sends SIGTERM two minutes before the time is
# up: the training saves a checkpoint and ends with 75, and the job is put into the queue again and goes on from there.
# Hardware: 2 hosts with 8 GPUs each. Unmeasured.
#SBATCH --job-name=jaxdistill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

# JAX takes one GPU a SLURM task unless it is told which it has
export JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7
srun --kill-on-bad-exit=0 jaxdistill train "$1" --distributed --set train.mesh.slices="$SLURM_NNODES" \
    --set train.mesh.data="$SLURM_NNODES"
code=$?
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
