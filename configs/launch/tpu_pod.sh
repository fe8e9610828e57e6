#!/usr/bin/env bash
# Training on all hosts of a TPU VM pod slice; JAX finds the other processes by itself.
#
#     bash configs/launch/tpu_pod.sh NAME ZONE my.yaml
#
# jaxdistill is installed on every host (`bash tools/install.sh`), and the run's folder lies on a file system that all of
# them see. To stop with a checkpoint, send SIGTERM to one process: all of them save, and end with 75.
# Hardware: a slice of any size. Unmeasured.
set -euo pipefail
gcloud compute tpus tpu-vm ssh "$1" --zone "$2" --worker=all --command "jaxdistill train '$3' --distributed"
