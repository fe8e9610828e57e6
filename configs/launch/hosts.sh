#!/usr/bin/env bash
# Training on any hosts that reach each other by ssh, without a scheduler: process 0 runs on the first.
#
#     bash configs/launch/hosts.sh my.yaml host-a host-b ...
#
# jaxdistill and the config are found under the same path on all of them, and the run's folder is on a file system that
# all of them see. Several processes on one machine work alike, with --coordinator 127.0.0.1:PORT.
# Hardware: any. Unmeasured on more than one machine; processes on one are tested (tests/train/test_processes.py).
set -euo pipefail
config=$1
shift
hosts=("$@")
port=${PORT:-8476}
for i in "${!hosts[@]}"; do
    ssh "${hosts[$i]}" "cd '$PWD' && jaxdistill train '$config' --coordinator '${hosts[0]}:$port' \
        --processes ${#hosts[@]} --process $i" &
done
code=0
for job in $(jobs -p); do wait "$job" || code=$?; done
exit "$code"
