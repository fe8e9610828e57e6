"""Config of the teacher and its engines, and of the collection of traces."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Any, Literal
from urllib.parse import urlsplit

from jaxdistill.config.base import require, section
from jaxdistill.config.cluster import RayConfig

REQUEST_FIELDS = ("model", "messages", "prompt", "max_tokens", "max_completion_tokens", "stream", "n", "logprobs")
"""Of a request; those that `traces.server.extra` may not replace."""
OMITTABLE = ("temperature", "top_p", "seed")
"""Of a request; those that a server may refuse, and that `traces.server.omit` leaves out."""


@section
class VLLMConfig:
    """YAML section `*.vllm`: passed through to vLLM, which runs in a process of its own."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    enforce_eager: bool = False
    kv_cache_gib: int = 2
    """Size of the KV cache on the CPU backend; on an accelerator see `gpu_memory_utilization`."""
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    quantization: str | None = None
    enable_prefix_caching: bool = True
    reasoning_parser: str | None = None
    """Of a server that we start, where `traces.server.api` is `chat`: who takes thinking and answer apart."""
    python: str | None = None
    """Interpreter of an environment with vLLM in it; if absent, that of JAXDISTILL_VLLM_PYTHON, or else our own."""

    @property
    def interpreter(self) -> str:
        return self.python or os.environ.get("JAXDISTILL_VLLM_PYTHON") or sys.executable


@section
class ServerConfig:
    """YAML section `traces.server`: OpenAI-compatible servers that run already, or that are started for this run."""

    urls: tuple[str, ...] = ()
    """Base URLs such as `http://HOST:8000/v1`. They serve the same model, and share the work."""
    start: int = 0
    """Instead of `urls`: so many vLLM servers on this machine, set up by `traces.vllm`, started again if they die."""
    model: str | None = None
    """The name under which the servers know the model; needed only where they serve more than one."""
    api: Literal["completions", "chat"] = "completions"
    """`completions`: token ids in and out, as vLLM has it. `chat`: messages in, text out, by the server's template."""
    dialect: Literal["auto", "openai", "vllm"] = "auto"
    """Which fields a request has. `openai`: only those that the API documents. `vllm`: its own too, such as
    `return_token_ids`. `auto`: its own where the list of models says that the server is vLLM."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the limit of tokens is called; hosted reasoning models refuse the first name."""
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further fields of every request, which the server has to know: `{top_k: 20}`, `{reasoning_effort: high}`."""
    omit: tuple[str, ...] = ()
    """Fields that the server refuses: `temperature`, `top_p` or `seed`. It then samples as it likes."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the API key; none is sent if it is not set."""
    in_flight: int | None = None
    """Requests at a time and server; twice `vllm.max_num_seqs` if absent, so that vLLM always has a next one."""
    timeout_s: float = 1800.0
    """Of one request, from sending it to its last token."""
    retries: int = 6
    """Further attempts at a request that fails; after the last one it is recorded as failed, and the run goes on.
    Waiting for a server that limits its rate (429) is no attempt."""
    backoff_s: float = 1.0
    """Wait before the first retry; doubled at each further one, up to a minute, unless the server names a time."""
    patience_s: float = 900.0
    """How long to wait while no server can be reached at all; then the run stops, and can go on later. Also how long
    one request is sent again while servers answer that there are too many (429)."""

    def __post_init__(self):
        for url in self.urls:
            _check_url(url)
        require(len(set(self.urls)) == len(self.urls), "traces.server.urls names a server twice; name each once.")
        require(not (self.urls and self.start), "traces.server takes `urls` or `start`, not both; drop one.")
        for name in ("timeout_s", "backoff_s", "patience_s"):
            value = getattr(self, name)
            require(value > 0, f"traces.server.{name} is {value}; set it above 0, in seconds.")
        for name in ("start", "retries"):
            value = getattr(self, name)
            require(value >= 0, f"traces.server.{name} is {value}; set 0 or more.")
        require(
            self.in_flight is None or self.in_flight >= 1,
            f"traces.server.in_flight is {self.in_flight}; allow at least one request at a time.",
        )
        for name in self.omit:
            require(
                name in OMITTABLE, f"traces.server.omit has {name!r}; what may be left out is {', '.join(OMITTABLE)}."
            )
        for name in self.extra:
            require(
                name not in REQUEST_FIELDS,
                f"traces.server.extra has {name!r}, which is set by other keys; take it out of `extra`.",
            )


def _check_url(url: str) -> None:
    """A base URL, to which `/chat/completions` is added; servers without any path would answer 404 to all of it."""
    path = urlsplit(url).path.rstrip("/")
    for ending in ("/chat/completions", "/completions", "/models"):
        require(not path.endswith(ending), f"traces.server.urls has {url}; leave {ending} out: {url.split(ending)[0]}.")
    require(
        url.startswith(("http://", "https://")) and bool(urlsplit(url).netloc) and bool(path),
        f"traces.server.urls has {url}; write it as http://HOST:PORT/v1.",
    )


@section
class TracesConfig:
    """YAML section `traces`: who writes the traces, and how they are sampled."""

    engine: Literal["vllm", "server", "jax", "import"]
    """`vllm`: offline engine in its own process. `server`: any OpenAI-compatible servers (`traces.server`). `jax`: the
    embedded decoder. `import`: the responses that came with the problems."""
    executor: Literal["local", "ray"] = "local"
    """Where the engines `vllm` and `jax` run: here, or on the workers of a Ray cluster (`traces.ray`), one on each."""
    teacher: str | None = None
    """A Hugging Face folder or repository id; `demo` is the small teacher that ships with the package."""
    revision: str | None = None
    styles: tuple[str, ...] = ("plain",)
    """How the teacher is asked: names from `traces/styles.yaml` or from `styles_file`. Each samples each problem."""
    styles_file: str | None = None
    """A YAML file with styles of your own, written like the package's."""
    system: str | None = None
    """System prompt of the styles that have none of their own, such as `plain`."""
    suffix: str = ""
    """Added to the problem's text, such as an instruction to box the answer."""
    think_tags: tuple[str, str] = ("<think>", "</think>")
    """What the teacher puts around its thinking; traces are written with `<think>` and `</think>` in their place."""
    samples: int = 1
    """Samples a problem and style."""
    until_kept: int = 0
    """Draw `samples` more of a problem and style until so many are kept by `verify`, or `max_samples` are drawn."""
    max_samples: int | None = None
    """The budget of `until_kept`: at most so many samples a problem and style."""
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int = 0
    logprobs: int = 0
    """Keep the logprobs of so many likeliest tokens at each position: raw, before temperature and top-p. For imported
    traces `teacher` computes them, one prefill each."""
    logprobs_kind: Literal["top", "random"] = "top"
    """`random`: so many random draws from the teacher's whole distribution instead of its likeliest tokens; on average,
    unlike those, they say what all of it says (arXiv:2503.16870). In JAX alone."""
    logprobs_temperature: float = 1.0
    """Divides the teacher's logits before `logprobs` are taken, for a `train.distill.temperature` other than 1. In JAX
    alone."""
    scorer: Literal["vllm", "server", "jax"] = "vllm"
    """What computes the logprobs of imported traces: an engine. `server`: vLLM's (`traces.server`), as other servers do
    not tell the logprobs of a prompt."""
    retry_failed: bool = False
    """Draw again what is recorded as failed; of a finished stage, remove `traces/manifest.json` first."""
    batch: int = 256
    """Rows decoded at once by the JAX engine; vLLM has `vllm.max_num_seqs`."""
    vllm: VLLMConfig = VLLMConfig()
    server: ServerConfig = ServerConfig()
    ray: RayConfig = RayConfig()

    def __post_init__(self):
        require(self.samples >= 1, f"traces.samples is {self.samples}; sample at least once a problem.")
        require(self.temperature >= 0, f"traces.temperature is {self.temperature}; set 0 (greedy) or more.")
        require(0 < self.top_p <= 1, f"traces.top_p is {self.top_p}; set a share in (0, 1].")
        require(self.max_tokens >= 1, f"traces.max_tokens is {self.max_tokens}; set at least 1.")
        if self.engine != "import":
            require(self.teacher is not None, f"traces.engine: {self.engine} needs `traces.teacher`, a checkpoint.")
        self._check_styles()
        self._check_resampling()
        if self.asked == "server":
            what = "engine" if self.engine == "server" else "scorer"
            require(
                bool(self.server.urls) or self.server.start > 0,
                f"traces.{what}: server needs `traces.server.urls`, or `traces.server.start: 1` to start one here.",
            )
        self._check_logprobs()
        require(
            self.executor == "local" or self.asked in ("vllm", "jax"),
            "traces.executor: ray runs the engines vllm and jax, and traces.scorer for imported traces with "
            "traces.logprobs; set traces.executor: local.",
        )

    @property
    def asked(self) -> str | None:
        """The engine that is asked for tokens or logprobs; None where nothing is."""
        if self.engine != "import":
            return self.engine
        return self.scorer if self.logprobs else None

    @property
    def asked_server(self) -> ServerConfig | None:
        """The servers, where they are the engine that is asked."""
        return self.server if self.asked == "server" else None

    def _check_logprobs(self):
        most = 20 if self.engine == "server" else 1024
        require(
            0 <= self.logprobs <= most, f"traces.logprobs is {self.logprobs}; engine {self.engine} gives 0 to {most}."
        )
        require(
            not self.logprobs or self.asked != "server" or self.server.api == "completions",
            "traces.logprobs needs engine vllm or jax, or a server with server.api: completions; set it to 0.",
        )
        in_jax = self.engine == "jax" or (self.engine == "import" and self.scorer == "jax")
        T = self.logprobs_temperature
        require(T > 0, f"traces.logprobs_temperature is {T}; set it above 0.")
        require(
            T == 1 or (in_jax and self.logprobs_kind == "top"),
            "traces.logprobs_temperature other than 1 needs logprobs_kind top, and engine jax or scorer jax.",
        )
        require(
            self.logprobs_kind == "top" or in_jax,
            "traces.logprobs_kind: random needs engine jax, or engine import with traces.scorer: jax.",
        )
        require(
            not (self.logprobs and self.engine == "import") or self.teacher is not None,
            "traces.logprobs of imported traces are a teacher's; name it with `traces.teacher`.",
        )

    def _check_styles(self):
        require(bool(self.styles), "traces.styles is empty; name at least one, such as plain.")
        require(len(set(self.styles)) == len(self.styles), "traces.styles names a style twice; name each once.")
        require(
            all(tag.strip() for tag in self.think_tags) and self.think_tags[0] != self.think_tags[1],
            f"traces.think_tags is {list(self.think_tags)}; give an opening and a closing tag that differ.",
        )

    def _check_resampling(self):
        require(self.until_kept >= 0, f"traces.until_kept is {self.until_kept}; set 0 (off) or more.")
        require(
            not self.until_kept or (self.max_samples is not None and self.max_samples >= self.samples),
            f"traces.until_kept needs `traces.max_samples`, a budget of at least samples={self.samples} a problem.",
        )
        require(
            not self.until_kept or self.temperature > 0,
            "traces.until_kept draws again, but temperature 0 always draws the same; raise traces.temperature.",
        )
