"""Config of the Ray cluster that a stage works on."""

from __future__ import annotations

import dataclasses

from jaxdistill.config.base import require, section


@section
class RayConfig:
    """YAML section `*.ray`: the cluster of `executor: ray`, and what each of its workers is given."""

    address: str | None = None
    """`auto`: the cluster that this machine belongs to. `HOST:PORT` or `ray://HOST:PORT`: that one. If absent, a
    cluster of this machine alone, for as long as the stage runs."""
    workers: int | None = None
    """Ray actors; as many as the cluster has room for if absent."""
    num_cpus: float = 1.0
    """Processors of a worker."""
    num_gpus: float = 0.0
    """GPUs of a worker; it sees no others. With vLLM: tensor_parallel_size times pipeline_parallel_size."""
    resources: dict[str, float] = dataclasses.field(default_factory=dict)
    """What else a worker needs, by the cluster's names, such as `{TPU: 4}`."""
    wait_s: float = 60.0
    """How long to wait for a place for the first worker, as where nodes have yet to be started."""
    retries: int = 3
    """How often a worker that dies is replaced, and what it was working on asked again."""

    def __post_init__(self):
        host, colon, port = (self.address or "").removeprefix("ray://").rpartition(":")
        require(
            self.address in (None, "auto") or bool(host and colon and port.isdigit()),
            f"address is {self.address}; write it as auto, HOST:PORT or ray://HOST:PORT.",
        )
        require(self.workers is None or self.workers >= 1, f"workers is {self.workers}; ask for at least 1, or none.")
        for name in ("num_cpus", "num_gpus", "retries"):
            value = getattr(self, name)
            require(value >= 0, f"{name} is {value}; set 0 or more.")
        for name, value in self.resources.items():
            require(
                value > 0 and name not in ("CPU", "GPU"),
                f"resources has {name}: {value}; give amounts above 0, and processors and GPUs by num_cpus, num_gpus.",
            )
        require(
            self.num_cpus + self.num_gpus + sum(self.resources.values()) > 0,
            "a worker that needs nothing has no number; set num_cpus, num_gpus or resources above 0.",
        )
        require(self.wait_s > 0, f"wait_s is {self.wait_s}; set it above 0, in seconds.")

    @property
    def needs(self) -> dict[str, float]:
        """What one worker takes, by Ray's names."""
        found = {"CPU": self.num_cpus, "GPU": self.num_gpus, **self.resources}
        return {name: value for name, value in found.items() if value}
