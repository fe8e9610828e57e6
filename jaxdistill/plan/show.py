"""Plans for people, in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from jaxdistill import progress
from jaxdistill.plan.costs import outside_bytes
from jaxdistill.plan.estimate import LAUNCH_SECONDS, said
from jaxdistill.plan.job import Compiled
from jaxdistill.plan.planning import Plan, advice
from jaxdistill.plan.products import KERNEL_NAMES, forward_kernels
from jaxdistill.plan.targets import GIB

LABELS = {
    "compute": "compute",
    "memory": "elementwise passes, reductions, copies",
    "kernels": "attention kernels",
    "launches": "launches of kernels, which take longer than the work in them",
    "exposed": "communication that nothing hides",
}
SHORT = 1e-3
"""Seconds: what the host does for each step takes about as long."""
COLUMNS = ("mesh", "rows", "micro", "remat", "peak GiB", "of", "step s", "tokens/s", "MFU", "")


def show_plan(plan: Plan) -> None:
    """Everything that is known of one plan."""
    found, chip, say = plan.found, plan.topology.chip, progress.say
    train = plan.job.train
    chips = f" ({plan.topology.chips} chips)" if plan.topology.chips != plan.topology.devices else ""
    say(f"{plan.topology}: {plan.topology.devices} x {chip.title}{chips}, mesh {mesh_text(found.mesh)}")
    say(
        f"  {found.parameters:,} trained parameters, {train['batch_rows']} x {plan.job.row_tokens} tokens a step in "
        f"{train['micro_batches']} micro-batch(es), remat {remat_text(plan)}; compiled in {found.seconds:.0f} s"
    )
    limit = f" of {chip.hbm_gib:g} GiB" if chip.hbm_gib else ""
    over = found.peak_bytes / GIB - chip.hbm_gib
    verdict = f": {'fits' if plan.fits else f'DOES NOT FIT, {over:.2f} GiB too much'}" if chip.hbm_gib else ""
    say(f"  memory        {found.peak_bytes / GIB:.2f} GiB a device at the peak{limit}{verdict}")
    parts = {name: size for name, size in found.memory.items() if size}
    say("                " + ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items()))
    if not plan.fits:
        say(f"                {advice(plan.job, found.peak_bytes, found.remat)}")
    _show_flops(plan)
    _show_traffic(plan)
    if plan.fast and plan.slow:
        fast, slow = plan.fast, plan.slow
        say(f"  step          {time_text(fast.seconds, slow.seconds)}")
        for name, label in LABELS.items():
            if getattr(slow, name):
                what = "matrix products" if name == "compute" and slow.memory else label
                say(f"                {time_text(*sorted(getattr(of, name) for of in (fast, slow)))} {what}")
        say(f"  throughput    {_range(plan.tokens_per_second(slow), plan.tokens_per_second(fast), ',.0f')} tokens/s")
        say(f"  MFU           {_range(plan.mfu(slow), plan.mfu(fast), '.1%')}")
        hours = [plan.hours(of) for of in (fast, slow)]
        if hours[0] is not None and hours[1] is not None:
            n = plan.topology.chips
            took = time_text(3600 * hours[0], 3600 * hours[1])
            say(f"  run           {plan.steps:,} steps: {took}, {chip_hours_text(hours[0] * n, hours[1] * n)}")
        else:
            say("  run           how many steps there are is known once the rows are packed (`prepare`), or by --steps")
    for warning in warnings_of(plan):
        say(f"  WARNING: {warning}")
    say("  assumed: " + "; ".join(said(plan.topology, quick=plan.job.quick)) + ".")


def _show_flops(plan: Plan) -> None:
    found = plan.found
    kernels = sum(found.kernel_flops.values())
    off = found.flops / found.analytic_flops - 1
    progress.say(
        f"  FLOPs         {(found.flops + kernels):.4g} a device and step: {found.flops:.4g} of matrix products (from "
        f"shapes: {found.analytic_flops:.4g}, {off:+.2%}), {kernels:.4g} in attention kernels"
    )
    if found.kernels:
        progress.say("                " + ", ".join(f"{name} x{count:,.0f}" for name, count in found.kernels.items()))
    progress.say(f"  attention     {attention_text(found)}")
    if found.moved:
        parts = sorted(found.moved.items(), key=lambda item: -item[1])
        progress.say(
            f"  bytes moved   {sum(found.moved.values()) / 1e9:.4g} GB a device and step, "
            f"{outside_bytes(found.moved) / 1e9:.4g} GB of them outside of products, attention and collectives:"
        )
        progress.say(
            "                " + ", ".join(f"{name} {size / 1e9:.3g}" for name, size in parts) + offload_text(found)
        )


def offload_text(found: Compiled) -> str:
    return f", {found.offloaded_bytes / 1e9:.3g} GB to the host's memory and back" if found.offloaded_bytes else ""


def attention_text(found: Compiled) -> str:
    """Which kernel attention takes, and how often its forward pass runs."""
    forward = forward_kernels(found.kernels)
    if not forward:
        return f"{found.attention or 'unknown'}: written in JAX, no kernel of its own"
    names = ", ".join(name for name, count in found.kernels.items() if count and name in KERNEL_NAMES)
    return f"{names}: {forward / max(found.layers, 1):.3g} forward kernel(s) a layer and step"


def _show_traffic(plan: Plan) -> None:
    for t in plan.found.traffic[:8]:
        how = "asynchronous" if t.asynchronous else "synchronous"
        over = f" over {t.axes:g} torus axes" if t.network == "ICI" else ""
        progress.say(
            f"  {t.network:<13} {t.bytes / 1e9:.3g} GB {t.kind} x{t.calls:,.0f} among {t.devices}{over}, {how}"
        )


def warnings_of(plan: Plan) -> list[str]:
    """What is wasteful in a plan that compiles."""
    found, warnings = plan.found, []
    for scope, count in found.unknown_loops.items():
        warnings.append(f"{count:.0f} loop(s) of unknown length count once: {scope[-80:]}")
    sent = sum(t.bytes for t in found.traffic)
    whole = [t for t in found.traffic if t.kind == "all-reduce" and t.bytes > 0.05 * sent and t.devices > 1]
    flat = found.mesh["fsdp"] == plan.topology.devices // plan.topology.slices and found.mesh["fsdp"] > 1
    if plan.topology.chip.platform == "gpu" and found.moved and not forward_kernels(found.kernels):
        warnings.append(f"attention is written in JAX ({found.attention}), which is slow: {_why_no_kernel(plan)}")
    if plan.topology.chip.platform == "tpu" and flat and whole:
        warnings.append(
            f"fsdp={found.mesh['fsdp']} spans the whole torus, where gradients are all-reduced and cut, twice the "
            f"bytes of a reduce-scatter ({sum(t.bytes for t in whole) / 1e9:.3g} GB); a second axis may do better"
        )
    waiting = sum(t.bytes for t in found.traffic if not t.asynchronous)
    if sent and waiting > 0.5 * sent and plan.topology.devices > 1:
        warnings.append(f"{waiting / sent:.0%} of the bytes are sent synchronously: the devices wait for them")
    slow = plan.slow
    if slow is not None and slow.launches:
        warnings.append(
            f"a step this short is bound by the launches of its {found.launches:,.0f} kernels, about "
            f"{1e6 * LAUNCH_SECONDS:g} µs each: its time is a floor and no estimate"
        )
    elif slow is not None and slow.seconds < SHORT:
        warnings.append("a step this short is bound by what the host does for it: its time is a floor and no estimate")
    return warnings


def _why_no_kernel(plan: Plan) -> str:
    """Why attention of a GPU's step is none of its kernels, and the way out."""
    train = plan.job.train
    if train["attention"] == plan.found.attention:
        return "chosen by train.attention; set auto"
    if train["compute_dtype"] == "float32":
        return "no kernel takes fp32, which train.compute_dtype asks for; set bfloat16"
    return "no kernel of this GPU takes it"


def mesh_text(mesh: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "1 device"


def remat_text(plan: Plan) -> str:
    """The policy, and whether it was chosen by `auto`."""
    asked, had = plan.job.train["remat"], plan.found.remat
    return asked if had in ("", asked) else f"{had} ({asked})"


def time_text(low: float, high: float) -> str:
    """A range of seconds in the unit that suits it, from microseconds to hours."""
    units = {"hours": 3600.0, "s": 1.0, "ms": 1e-3, "µs": 1e-6}
    enough = {"hours": 360.0, "s": 0.01, "ms": 1e-4, "µs": 0.0}
    unit = next(name for name, least in enough.items() if high >= least)
    return f"{_number(low / units[unit])} to {_number(high / units[unit])} {unit}"


def chip_hours_text(low: float, high: float) -> str:
    return (
        f"{_number(low)} to {_number(high)} chip-hours" if low >= 0.01 else f"at most {max(high, 0.01):.2f} chip-hours"
    )


def _seconds(value: float) -> str:
    return f"{value:.3g}" if value >= 1e-4 else f"{value:.6f}"


def _number(value: float) -> str:
    """Three digits, and never an exponent for what is large."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _range(low: float, high: float, form: str) -> str:
    return f"{low:{form}} to {high:{form}}"


def row_of(plan: Plan) -> list[str]:
    """One line of a table of `COLUMNS`."""
    train, chip = plan.job.train, plan.topology.chip
    fast, slow = plan.fast, plan.slow
    timed = fast is not None and slow is not None
    return [
        mesh_text(plan.found.mesh),
        str(train["batch_rows"]),
        str(train["micro_batches"]),
        remat_text(plan),
        f"{plan.found.peak_bytes / GIB:.2f}",
        f"{chip.hbm_gib:g}" if chip.hbm_gib else "",
        f"{_seconds(fast.seconds)} to {_seconds(slow.seconds)}" if timed else "",  # pyrefly: ignore
        _range(plan.tokens_per_second(slow), plan.tokens_per_second(fast), ",.0f") if timed else "",  # pyrefly: ignore
        _range(plan.mfu(slow), plan.mfu(fast), ".0%") if timed else "",  # pyrefly: ignore
        "" if plan.fits else "does not fit",
    ]


def show_table(rows: Sequence[Sequence[str]], columns: Sequence[str] = COLUMNS) -> None:
    table = Table(*columns, box=None, header_style="bold")
    for row in rows:
        table.add_row(*row)
    progress.console.print(table)
