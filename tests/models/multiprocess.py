"""One of several processes that start from a checkpoint together; see test_start.py.

python multiprocess.py PORT PROCESSES PROCESS FOLDER
"""

import json
import os
import sys
import traceback
from pathlib import Path


def main(port: int, processes: int, process: int, folder: Path) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    if process:  # the first process alone asks transformers
        sys.modules["torch"] = None  # type: ignore[assignment]
    import jax

    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=processes, process_id=process)

    from jaxdistill.models import load_hf
    from jaxdistill.models.start import check_start, load_checked
    from jaxdistill.parallel.mesh import make_mesh

    said = {}
    seen = folder / f"checked-{process}.json"  # each has a home of its own
    mesh = make_mesh({"fsdp": -1})
    model = load_hf(folder / "same", mesh)
    for name, given in (("model", model), ("files", None)):
        said[name] = [found and found.max_difference for found in (check_start(folder / "same", given, seen=seen),)]
        said[f"{name} again"] = check_start(folder / "same", given, seen=seen) is None
        if process == 0:
            seen.unlink()
    said["loaded"] = load_checked(folder / "same", mesh, check=True, param_dtype="bfloat16").config.num_layers
    try:
        check_start(folder / "other", model, seen=seen)
    except ValueError as error:
        said["other"] = str(error)
    said["remembers"] = seen.exists()
    (folder / f"said-{process}.json").write_text(json.dumps(said))
    jax.distributed.shutdown()


if __name__ == "__main__":
    try:
        main(*map(int, sys.argv[1:4]), Path(sys.argv[4]))
    except BaseException:
        # at once: a process that ends in the usual way waits for the others, which may be waiting for it
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
