"""One of several processes that hold a model together; see test_processes.py.

python multiprocess.py PORT PROCESSES PROCESS DEVICES FOLDER
"""

import json
import os
import resource
import sys
import traceback
from pathlib import Path


def main(port: int, processes: int, process: int, devices: int, folder: Path) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    import jax

    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=processes, process_id=process)
    assert (jax.process_count(), jax.device_count()) == (processes, processes * devices)

    from jaxdistill.export import export_hf
    from jaxdistill.export.check import check_logits
    from jaxdistill.models import load_hf, params_of, with_params
    from jaxdistill.parallel.mesh import make_mesh

    said = {}
    model = load_hf(folder / "in", make_mesh({"fsdp": 2, "tensor": -1}))
    said["whole arrays here"] = model.layers.q[...].is_fully_addressable
    more = {"tokenizer": folder / "in", "card": "card", "max_shard_bytes": 60_000}
    for dtype in ("float32", "bfloat16"):
        out = folder / f"{processes}-{dtype}"

        def check(path: Path | None, dtype=dtype):
            return {"folder": path and path.name} | check_logits(model, path, dtype)

        said[dtype] = export_hf(model, out, dtype=dtype, check=check, **more)
        said[f"{dtype} is there"] = (out / "config.json").is_file()  # in every process, once export_hf returns

    def failure(**changed) -> str:
        try:
            export_hf(model, folder / f"{processes}-failed", **more | changed)
        except ValueError as error:
            return str(error)
        return "nothing failed"

    def refuse(path: Path | None) -> None:
        if path is not None:
            raise ValueError("the first process does not like it")

    said["check fails"] = failure(check=refuse)
    other = with_params(model, params_of(model) | {"norm": 2 * params_of(model)["norm"]})
    said["logits differ"] = failure(check=lambda path: check_logits(other, path))
    said["no tokenizer"] = failure(tokenizer=folder / "nowhere")
    if process == 0:  # the disk of the process that writes is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
    said["disk is full"] = failure()
    (folder / f"said-{processes}-{process}.json").write_text(json.dumps(said))
    if processes > 1:
        jax.distributed.shutdown()


if __name__ == "__main__":
    try:
        main(*map(int, sys.argv[1:5]), Path(sys.argv[5]))
    except BaseException:
        # at once: a process that ends in the usual way waits for the others, which may be waiting for it
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
