#!/usr/bin/env bash
# One NaN metric makes Orbax's keep-the-best CheckpointManager delete the best checkpoint and keep a worse one.
#
# The manager sorts the checkpoints by their metric, and NaN compares false with everything, so the sort leaves them out of
# order. One evaluation that overflows is enough: the lowest loss is deleted and best_step() names a later, worse checkpoint.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3.11 -m venv env
env/bin/pip install --quiet --quiet orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2

cat > program.py <<'PY'
import sys
import tempfile
from importlib.metadata import version

import orbax.checkpoint as ocp

NAN = float("nan")


def kept(losses, how_many):
    """The losses of the checkpoints left after each of `losses` was saved, and the one that is called the best."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=how_many,
        best_fn=lambda metrics: metrics["loss"],
        best_mode="min",
        enable_async_checkpointing=False,
    )
    with ocp.CheckpointManager(tempfile.mkdtemp(dir="."), options=options) as manager:
        for step, loss in enumerate(losses):
            manager.save(step, args=ocp.args.JsonSave({"step": step}), metrics={"loss": loss})
        return [losses[step] for step in manager.all_steps()], losses[manager.best_step()]


print(f"orbax-checkpoint {version('orbax-checkpoint')}, jax {version('jax')}")
cases = [  # losses in the order of saving, how many to keep, what is expected, what is seen
    ([0.4, 0.9, 0.6], 1, [0.4], [0.4]),
    ([0.4, NAN, 0.6], 1, [0.4], [0.6]),
    ([0.5, 0.4, NAN, 0.6, 0.7, 0.8], 2, [0.5, 0.4], [0.6, 0.7]),
]
changed = False
for losses, how_many, expected, described in cases:
    left, best = kept(losses, how_many)
    print(f"losses {losses}, keep {how_many}: expected {expected}, seen {left}; best_step() has loss {best}")
    changed |= left != described
if changed:
    sys.exit("CHANGED: other checkpoints are kept than described")
print("as described: after a NaN the checkpoint with the lowest loss, 0.4, is gone")
PY
JAX_PLATFORMS=cpu env/bin/python -I program.py
