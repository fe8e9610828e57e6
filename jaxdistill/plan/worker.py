"""One compilation, in a process of its own: reads a `Job` from stdin, writes a `Compiled` or `OutOfMemory` to stdout.

    python -m jaxdistill.plan.worker < job.json

It runs in the environment of the target's compiler (`environments`), on a machine without the target.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import time
from typing import TYPE_CHECKING, Any

from jaxdistill.plan.job import Compiled, Job, OutOfMemory, Traffic
from jaxdistill.plan.targets import Topology

if TYPE_CHECKING:
    from jaxdistill.train.program import Program

ANSWER = "jaxdistill-plan-answer: "
EFFORT = -1.0
"""`exec_time_optimization_effort` of a quick compilation."""


def main() -> int:
    job = Job(**json.load(sys.stdin))
    topology = Topology.of(job.topology, job.slices)
    # read when JAX is imported: this machine's own devices stay out of it, and no metadata server is asked
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    if topology.chip.platform == "cpu":
        flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={topology.devices}".strip()
    try:
        answer = {"compiled": dataclasses.asdict(compile_step(job, topology))}
    except ValueError as error:
        answer = {"refused": " ".join(str(error).split())}
    except RuntimeError as error:  # XLA's
        found = out_of_memory(str(error))
        if found is None:
            raise
        had = make_described(job, topology)[0].model.remat
        answer = {"out_of_memory": dataclasses.asdict(dataclasses.replace(found, remat=had))}
    print(ANSWER + json.dumps(answer))
    return 0


def compile_step(job: Job, topology: Topology) -> Compiled:
    """Compiles the step that `train` would run.

    Raises:
      ValueError: a mesh that does not fit devices, model or batch.
      RuntimeError: XLA's; `RESOURCE_EXHAUSTED` where it does not fit.
    """
    import resource

    import jax

    from jaxdistill.plan.costs import analyze
    from jaxdistill.plan.hlo import parse
    from jaxdistill.plan.shapes import Sizes, device_bytes
    from jaxdistill.plan.workspaces import workspace_bytes
    from jaxdistill.train.flops import FlopCounter
    from jaxdistill.train.program import abstract_inputs

    made, dtypes = make_described(job, topology)
    mesh = made.mesh
    state, batch, frozen, teacher = abstract_inputs(made, **dtypes)
    sizes = Sizes(made, job.train["micro_batches"], job.trained_share, job.segment_tokens)
    begun = time.monotonic()
    lowered = made.step.lower(state, batch, frozen, teacher)
    options: dict[str, Any] | None = {"exec_time_optimization_effort": EFFORT} if job.quick else None
    if options and topology.generation == "tpu7x":
        # with little effort libtpu 0.0.42 dies of a check in this: "std::abs(inc) < core_count() (1 vs. 1)"
        for name in ("all_reduce", "reduce_scatter", "all_gather"):
            options[f"xla_tpu_enable_sparse_core_collective_offload_{name}"] = False
    compiled = lowered.compile(compiler_options=options)
    seconds = time.monotonic() - begun
    text, peak = compiled.as_text(), compiler_peak(compiled.memory_analysis(), topology.chip.platform)
    assert text is not None, "these compilers tell it"
    libraries = workspace_bytes(parse(text)[0]) if topology.chip.platform == "gpu" else 0.0
    costs = analyze(text, mesh.size, sizes.loop_length, platform=topology.chip.platform)
    counter = FlopCounter(made.student, made.lora)
    parts = {
        "params": device_bytes(state["params"]),
        "optimizer": device_bytes(state["optimizer"]),
        "frozen": device_bytes(frozen),
        "teacher": device_bytes(teacher),
        "batch": device_bytes(batch),
    }
    return Compiled(
        mesh=dict(mesh.shape),
        peak_bytes=peak + libraries,
        memory=split_memory(peak, parts, device_bytes(state["params"]), sizes.vocabulary_bytes())
        | {"libraries": libraries},
        flops=costs.flops,
        kernel_flops={name: flops * sizes.kernel_share for name, flops in costs.kernel_flops.items()},
        cycles=costs.cycles,
        kernels=dict(costs.kernels),
        traffic=traffic_of(costs, list(mesh.devices.flat), topology),
        unknown_loops=dict(costs.unknown_loops),
        analytic_flops=sizes.matrix_flops() + sizes.attention_flops(),
        model_flops=counter.of(made.shape[0] * made.shape[1], sizes.pairs()),
        tokens=made.shape[0] * made.shape[1],
        parameters=sum(x.size for x in jax.tree.leaves(state["params"])),
        seconds=seconds,
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0,
        moved=dict(costs.moved),
        products=[(flops, size, count) for (flops, size), count in costs.products.items()],
        launches=costs.launches,
        offloaded_bytes=costs.offloaded_bytes,
        layers=made.student.num_layers,
        remat=made.model.remat,
        attention=sizes.kernel,
    )


def compiler_peak(memory: Any, platform: str) -> float:
    """Bytes that XLA's own buffers take at the peak, arguments included; from `memory_analysis`."""
    assert memory is not None, "these compilers tell it"
    if platform != "cpu":
        return float(memory.peak_memory_in_bytes)
    # here the peak leaves out what is temporary, which CPUs hold as one block from the first instruction to the last
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return float(held + memory.temp_size_in_bytes)


def make_described(job: Job, topology: Topology) -> tuple[Program, dict[str, Any]]:
    """(what `train` would run on these devices, arguments of `abstract_inputs`).

    Raises:
      ValueError: a mesh that does not fit devices, model or batch.
    """
    import pydantic

    from jaxdistill.config import StudentConfig, TrainConfig, to_dict
    from jaxdistill.models import ModelConfig
    from jaxdistill.models.student import lora_of
    from jaxdistill.parallel.mesh import make_mesh
    from jaxdistill.plan.targets import GIB
    from jaxdistill.train.program import make_program, settle

    train = pydantic.TypeAdapter(TrainConfig).validate_python(job.train)
    student = pydantic.TypeAdapter(StudentConfig).validate_python({"init": "-", "lora": job.lora})
    shape = ModelConfig.from_hf(job.student, "the student's config.json")
    mesh, lora = make_mesh(to_dict(train.mesh), described_devices(topology)), lora_of(student)
    dtypes: dict[str, Any] = {"base_dtype": student.lora.base_dtype} if student.lora else {}
    # described devices do not tell how much memory they have
    memory = topology.chip.hbm_gib * GIB or None
    teacher = None if job.teacher is None else ModelConfig.from_hf(job.teacher, "the teacher's config.json")
    train = settle(train, shape, lora, mesh, job.row_tokens, memory=memory, teacher=teacher, **dtypes)
    made = make_program(
        train,
        shape,
        lora,
        mesh,
        distillation=described_distillation(job, train, shape, mesh),
        row_tokens=job.row_tokens,
        steps=job.steps,
        seed=job.seed,
        max_segments=job.max_segments,
    )
    if train.distill is not None:
        dtypes |= {"teacher_dtype": train.distill.dtype, "replicate": train.distill.replicate}
    return made, dtypes


def described_distillation(job: Job, train: Any, student: Any, mesh: Any) -> Any:
    """The step's `Distillation`, with shapes for a teacher; None if the student learns from tokens alone."""
    from jaxdistill.data.topk import TopK
    from jaxdistill.models import ModelConfig, abstract_model
    from jaxdistill.train.distill import Distillation, share_schedule

    d = train.distill
    if d is None:
        return None
    shared: dict[str, Any] = {"share": share_schedule(d, job.steps), "ce_weight": d.ce_weight}
    if job.teacher is None:
        return Distillation(**shared, stored=TopK(k=job.topk or 16, vocabulary=student.vocab_size))
    teacher = ModelConfig.from_hf(job.teacher, "the teacher's config.json")
    return Distillation(
        **shared,
        divergence=d.divergence,
        parameter=d.parameter,
        temperature=d.temperature,
        teacher=abstract_model(teacher, dtype=train.compute_dtype, mesh=mesh),
        vocabulary=min(student.vocab_size, teacher.vocab_size),
    )


def described_devices(topology: Topology) -> list[Any]:
    """The devices of a topology, which are not there (those of CPUs are).

    Raises:
      ValueError: the compiler does not know this shape.
    """
    import jax
    from jax.experimental import topologies

    chip = topology.chip
    if chip.platform == "cpu":
        return list(jax.devices())
    try:
        if chip.platform == "gpu":
            from jaxdistill.plan.gpus import pretend_cuda, target_config

            pretend_cuda(topology.generation)
            name = f"{topology.slices}x1x{topology.shape[0]}"
            described = topologies.get_topology_desc(
                name, "cuda", target_config=target_config(topology.generation), topology=name
            )
        else:
            more: dict[str, Any] = dict(chip.options)
            if topology.slices > 1:
                more["num_slices"] = topology.slices
            described = topologies.get_topology_desc(topology.name, "tpu", **more)
    except RuntimeError as error:
        raise ValueError(f"{topology}: the compiler does not know it ({' '.join(str(error).split())[:200]}).") from None
    return list(described.devices)


def split_memory(peak: float, arguments: dict[str, float], gradients: float, logits: float) -> dict[str, float]:
    """The peak by what it is needed for: arguments exactly, gradients and logits by their shapes, and the rest."""
    rest = max(0.0, peak - sum(arguments.values()))
    gradients = min(gradients, rest)
    logits = min(logits, rest - gradients)
    return arguments | {"gradients": gradients, "logits": logits, "activations": rest - gradients - logits}


def out_of_memory(text: str) -> OutOfMemory | None:
    """What XLA says of a program that does not fit; None if it speaks of something else."""
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

    def size(pattern: str) -> float:
        found = re.search(pattern, text)
        return float(found.group(1)) * units[found.group(2)] if found else 0.0

    needed = size(r"Used ([\d.]+)([KMGT]?) of") or size(r"\(([\d.]+)([KMGT]?)\) exceeds")
    available = size(r"of ([\d.]+)([KMGT]?) hbm") or size(r"available \w+ \(([\d.]+)([KMGT]?)\)")
    return OutOfMemory(needed_bytes=needed, available_bytes=available, text=" ".join(text.split())[:600])


def traffic_of(costs: Any, devices: list[Any], topology: Topology) -> list[Traffic]:
    """The collectives by the network that they go over."""
    found: dict[tuple, list[float]] = {}
    for key, sent in costs.collective_bytes.items():
        group = [devices[i] for i in key.group]
        inside = [d for d in group if slice_of(d) == slice_of(group[0])]
        outer = len({slice_of(d) for d in group})
        legs = []
        if len(inside) > 1:
            legs.append((topology_network(topology, False), len(inside), torus_axes(inside, topology, key.kind), sent))
        if outer > 1:
            # over slices, each device carries its own part of what its slice has summed up
            legs.append((topology_network(topology, True), outer, 1.0, sent / len(inside)))
        for network, size, axes, amount in legs:
            entry = found.setdefault((key.kind, network, size, axes, key.asynchronous), [0.0, 0.0])
            entry[0] += costs.collective_calls[key]
            entry[1] += amount
    return [
        Traffic(kind=k, network=n, devices=size, axes=axes, asynchronous=a, calls=calls, bytes=sent)
        for (k, n, size, axes, a), (calls, sent) in sorted(found.items(), key=lambda item: -item[1][1])
    ]


def slice_of(device: Any) -> int:
    """The number of a device's slice; of a GPU its host's, as a slower network lies between hosts."""
    return max(getattr(device, "slice_index", 0) or 0, device.process_index if device.platform == "gpu" else 0)


def topology_network(topology: Topology, outside: bool) -> str:
    names = {"tpu": ("ICI", "DCN"), "gpu": ("NVLink", "network"), "cpu": ("memory", "memory")}
    return names[topology.chip.platform][outside]


def torus_axes(group: list[Any], topology: Topology, kind: str) -> float:
    """Axes of the torus that the group can use at once: 1 for each ring, 0.5 for each line."""
    if topology.chip.platform != "tpu":
        return 1.0
    if kind == "collective-permute":
        return 0.5
    total = 0.0
    sizes = (*topology.shape, 1)[:3]
    for axis, size in enumerate(sizes):
        spread = len({d.coords[axis] for d in group})
        if spread > 1:
            wraps = topology.chip.wraps
            total += 1.0 if spread == size and size % wraps == 0 and size >= wraps else 0.5
    # both devices of one chip
    return total or 1.0


if __name__ == "__main__":
    sys.exit(main())
