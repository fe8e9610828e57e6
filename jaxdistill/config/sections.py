"""One frozen dataclass per YAML section; every section checks its own values."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from typing import Any, Literal, TypeVar, cast, dataclass_transform

import pydantic
from pydantic.dataclasses import dataclass

T = TypeVar("T")
_STRICT = pydantic.ConfigDict(extra="forbid", validate_default=True)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def section(cls: type[T]) -> type[T]:
    """A frozen, keyword-only dataclass that refuses unknown keys and wrong types."""
    return cast("type[T]", dataclass(frozen=True, kw_only=True, config=_STRICT)(cls))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@section
class ProblemsConfig:
    """YAML sections `problems` and `evaluate.problems`: where the questions and gold answers come from."""

    source: Literal[
        "demo",
        "gsm8k",
        "jsonl",
        "messages",
        "sharegpt",
        "r1",
        "prompt_completion",
        "humaneval",
        "mbpp",
        "apps",
        "livecodebench",
    ]
    """`jsonl`: questions and gold answers. `messages`, `sharegpt`, `r1` (`problem`, `generations`) and
    `prompt_completion` hold responses too, which `traces.engine: import` takes for traces. `humaneval`, `mbpp`, `apps`
    (TACO too) and `livecodebench` are code problems with tests."""
    path: str | None = None
    """JSON lines (`gsm8k`, `jsonl`); the others also read JSON, Parquet, and a folder of such or of `datasets`."""
    count: int | None = None
    """How many to take; all of them if absent. `demo` makes problems on the fly, so it needs a number."""
    seed: int = 0
    """Which problems `demo` makes. Training and held-out sets use different seeds and never share a question."""
    problem_field: str = "problem"
    answer_field: str = "answer"
    id_field: str | None = None
    domain: str = "math"

    def __post_init__(self):
        _require(self.count is None or self.count > 0, f"count is {self.count}; ask for at least one problem.")
        if self.source == "demo":
            _require(self.count is not None, "source: demo makes problems on the fly; say how many with `count`.")
        else:
            _require(self.path is not None, f"source: {self.source} reads a file; name it with `path`.")


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
    """Base URLs up to and with `/v1`. They serve the same model, and share the work."""
    start: int = 0
    """Instead of `urls`: so many vLLM servers on this machine, set up by `traces.vllm`, started again if they die."""
    model: str | None = None
    """The name under which the servers know the model; needed only where they serve more than one."""
    api: Literal["completions", "chat"] = "completions"
    """`completions`: token ids in and out, as vLLM has it. `chat`: messages in, text out, by the server's template."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the API key; none is sent if it is not set."""
    in_flight: int | None = None
    """Requests at a time and server; twice `vllm.max_num_seqs` if absent, so that vLLM always has a next one."""
    timeout_s: float = 1800.0
    """Of one request, from sending it to its last token."""
    retries: int = 6
    """Further attempts at a request that fails; after the last one it is recorded as failed, and the run goes on."""
    backoff_s: float = 1.0
    """Wait before the first retry; doubled at each further one, up to a minute, unless the server names a time."""
    patience_s: float = 900.0
    """How long to wait while no server can be reached at all; then the run stops, and can go on later."""

    def __post_init__(self):
        for url in self.urls:
            _require(
                url.startswith(("http://", "https://")) and url.rstrip("/").endswith("/v1"),
                f"traces.server.urls has {url}; write it as http://HOST:PORT/v1.",
            )
        _require(len(set(self.urls)) == len(self.urls), "traces.server.urls names a server twice; name each once.")
        _require(not (self.urls and self.start), "traces.server takes `urls` or `start`, not both; drop one.")
        for name in ("timeout_s", "backoff_s", "patience_s"):
            value = getattr(self, name)
            _require(value > 0, f"traces.server.{name} is {value}; set it above 0, in seconds.")
        for name in ("start", "retries"):
            value = getattr(self, name)
            _require(value >= 0, f"traces.server.{name} is {value}; set 0 or more.")
        _require(
            self.in_flight is None or self.in_flight >= 1,
            f"traces.server.in_flight is {self.in_flight}; allow at least one request at a time.",
        )


@section
class TracesConfig:
    """YAML section `traces`: who writes the traces, and how they are sampled."""

    engine: Literal["vllm", "server", "jax", "import"]
    """`vllm`: offline engine in its own process. `server`: any OpenAI-compatible servers (`traces.server`). `jax`: the
    embedded decoder. `import`: the responses that came with the problems."""
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
    traces `teacher` computes them in vLLM, one prefill each."""
    retry_failed: bool = False
    """Draw again what is recorded as failed; of a finished stage, remove `traces/manifest.json` first."""
    batch: int = 256
    """Rows decoded at once by the JAX engine; vLLM has `vllm.max_num_seqs`."""
    vllm: VLLMConfig = VLLMConfig()
    server: ServerConfig = ServerConfig()

    def __post_init__(self):
        _require(self.samples >= 1, f"traces.samples is {self.samples}; sample at least once a problem.")
        _require(self.temperature >= 0, f"traces.temperature is {self.temperature}; set 0 (greedy) or more.")
        _require(0 < self.top_p <= 1, f"traces.top_p is {self.top_p}; set a share in (0, 1].")
        _require(self.max_tokens >= 1, f"traces.max_tokens is {self.max_tokens}; set at least 1.")
        if self.engine != "import":
            _require(self.teacher is not None, f"traces.engine: {self.engine} needs `traces.teacher`, a checkpoint.")
        self._check_styles()
        self._check_resampling()
        if self.engine == "server":
            _require(
                bool(self.server.urls) or self.server.start > 0,
                "traces.engine: server needs `traces.server.urls`, or `traces.server.start: 1` to start one here.",
            )
        _require(0 <= self.logprobs <= 20, f"traces.logprobs is {self.logprobs}; vLLM gives 0 to 20 a position.")
        able = self.engine in ("vllm", "import") or (self.engine == "server" and self.server.api == "completions")
        _require(
            not self.logprobs or able,
            "traces.logprobs needs engine vllm, or engine server with server.api: completions; set it to 0 otherwise.",
        )
        _require(
            not (self.logprobs and self.engine == "import") or self.teacher is not None,
            "traces.logprobs of imported traces are a teacher's; name it with `traces.teacher`.",
        )

    def _check_styles(self):
        _require(bool(self.styles), "traces.styles is empty; name at least one, such as plain.")
        _require(len(set(self.styles)) == len(self.styles), "traces.styles names a style twice; name each once.")
        _require(
            all(tag.strip() for tag in self.think_tags) and self.think_tags[0] != self.think_tags[1],
            f"traces.think_tags is {list(self.think_tags)}; give an opening and a closing tag that differ.",
        )

    def _check_resampling(self):
        _require(self.until_kept >= 0, f"traces.until_kept is {self.until_kept}; set 0 (off) or more.")
        _require(
            not self.until_kept or (self.max_samples is not None and self.max_samples >= self.samples),
            f"traces.until_kept needs `traces.max_samples`, a budget of at least samples={self.samples} a problem.",
        )
        _require(
            not self.until_kept or self.temperature > 0,
            "traces.until_kept draws again, but temperature 0 always draws the same; raise traces.temperature.",
        )


@section
class CodeLimitsConfig:
    """YAML section `verify.code.limits`: what every run of a program may take."""

    cpu_s: int = 5
    """Processor seconds; a program that needs more is incorrect."""
    wall_s: float = 30.0
    """Seconds by the clock; a program that needs more, and not of the processor, is undecided."""
    total_s: float = 120.0
    """Seconds by the clock for all cases of a problem together."""
    memory_mib: int = 512
    """Address space, which is somewhat more than the memory in use."""
    output_mib: int = 4
    tmp_mib: int = 16
    """Of files, which are kept in memory."""
    threads: int = 32

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _require(value > 0, f"verify.code.limits.{field.name} is {value}; set it above 0.")
        _require(
            self.memory_mib >= 128,
            f"verify.code.limits.memory_mib is {self.memory_mib}; Python itself needs 128.",
        )


@section
class CodeConfig:
    """YAML section `verify.code`: how the programs of responses are run; used only for problems that have tests."""

    isolation: Literal["full", "namespaces", "filters", "limits"] = "namespaces"
    """The weakest isolation that is accepted, see `verify.code.sandbox`; a machine that offers less is refused."""
    limits: CodeLimitsConfig = CodeLimitsConfig()


@section
class VerifyConfig:
    """YAML section `verify`: which traces may be learned from."""

    answer: bool = True
    """Keep only traces whose final answer equals the gold answer; `undecided` is not kept."""
    think: Literal["required", "optional"] = "required"
    """Whether a trace must hold one non-empty `<think>...</think>` before its answer."""
    keep_per_problem: int | None = None
    """At most this many traces a problem (the lowest sample numbers); all of them if absent."""
    drop_duplicates: bool = True
    """Drop a trace whose response is the same, character for character, as an earlier one of its problem."""
    code: CodeConfig = CodeConfig()
    workers: int | None = None
    """Processes that judge; as many as there are processors if absent."""

    def __post_init__(self):
        _require(
            self.workers is None or self.workers >= 1,
            f"verify.workers is {self.workers}; at least 1 process has to work.",
        )


@section
class SourceConfig:
    """YAML section `data.mixture[i]`: one source of examples, and its share of the training."""

    name: str
    run: str | None = None
    """Folder of another run, with its problems, traces and verdicts; this run's own if absent."""
    domains: tuple[str, ...] = ()
    """Only traces of problems of these domains; of all domains if empty."""
    weight: float | None = None
    """Share of the rows, relative to the other sources' weights; each gets what it has if none is weighted."""
    max_examples: int | None = None
    """At most this many kept traces, picked by a hash of their ids."""
    system: str | None = None
    """Instead of `data.system`."""
    suffix: str | None = None
    """Instead of `data.suffix`, such as a domain's own instruction for its answers."""

    def __post_init__(self):
        _require(
            self.weight is None or 0 < self.weight < float("inf"),
            f"data.mixture: the weight of {self.name} is {self.weight}; set it above 0, or leave the source out.",
        )
        _require(
            self.max_examples is None or self.max_examples > 0,
            f"data.mixture: max_examples of {self.name} is {self.max_examples}; set at least 1.",
        )


@section
class PhaseConfig:
    """YAML section `data.curriculum.phases[i]`."""

    until: float | None = None
    """The hardest that this phase takes: at most so many tokens or steps, or at least this pass rate."""
    passes: int = 1
    """How often the phase goes through its rows."""

    def __post_init__(self):
        _require(self.passes >= 1, f"data.curriculum.phases: passes is {self.passes}; set at least 1.")


@section
class CurriculumConfig:
    """YAML section `data.curriculum`: phases from easy to hard; after the last one, everything, shuffled."""

    by: Literal["tokens", "steps", "pass_rate"]
    """`tokens` of the response, `steps` (lines) of its thinking, or the share of the teacher's samples of the problem
    that were correct (a high rate is easy)."""
    parts: int | None = None
    """This many phases of about equal tokens, one pass each."""
    phases: tuple[PhaseConfig, ...] = ()
    """Instead of `parts`: each phase's bound; the last one has none."""
    cumulative: bool = False
    """Whether a phase also has the rows of the easier ones ("baby steps"), or its own alone ("one pass")."""

    def __post_init__(self):
        _require(
            (self.parts is None) == bool(self.phases),
            "data.curriculum needs exactly one of `parts` (a number) and `phases` (a list of `until` and `passes`).",
        )
        _require(self.parts is None or self.parts >= 2, f"data.curriculum.parts is {self.parts}; set at least 2.")
        if self.phases:
            bounds = [p.until for p in self.phases[:-1] if p.until is not None]
            _require(
                len(bounds) == len(self.phases) - 1 >= 1 and self.phases[-1].until is None,
                "data.curriculum.phases: give at least two, each with an `until` but the last, which takes the rest.",
            )
            steps = [b - a for a, b in itertools.pairwise(bounds)]
            _require(
                all(s < 0 if self.by == "pass_rate" else s > 0 for s in steps),
                f"data.curriculum.phases: `until` is {', '.join(f'{b:g}' for b in bounds)}; "
                f"for {self.by} it has to {'fall' if self.by == 'pass_rate' else 'rise'}, from easy to hard.",
            )


@section
class DataConfig:
    """YAML section `data`: from kept traces to packed rows."""

    row_tokens: int
    """Length of a packed row, T."""
    response: Literal["reasoning", "answer"] = "reasoning"
    """What is imitated: thinking and answer, or the answer behind an empty thinking (the answer-only baseline)."""
    overlong: Literal["error", "drop", "keep"] = "error"
    """An example longer than a row is never cut: refuse it, drop it and count it, or make all rows as long as it is."""
    system: str | None = None
    suffix: str = ""
    chat_template: str | None = None
    """Instead of the tokenizer's own: `plain`, `chatml`, or a file; for base models, which often have none."""
    mixture: tuple[SourceConfig, ...] = ()
    """Sources and their weights; all kept traces of this run if empty."""
    curriculum: CurriculumConfig | None = None
    workers: int | None = None
    """Processes that tokenize; as many as there are processors, or one for little data, if absent."""

    def __post_init__(self):
        _require(self.row_tokens >= 2, f"data.row_tokens is {self.row_tokens}; a row needs at least 2 tokens.")
        _require(
            self.workers is None or self.workers >= 1,
            f"data.workers is {self.workers}; at least 1 process has to work.",
        )
        names = [source.name for source in self.mixture]
        _require(len(set(names)) == len(names), f"data.mixture: two sources have the same name ({', '.join(names)}).")
        weighted = sum(source.weight is not None for source in self.mixture)
        _require(
            weighted in (0, len(names)),
            "data.mixture: some sources have a weight and some have none; give it to all, or to none.",
        )


@section
class ArchitectureConfig:
    """YAML section `student.architecture`: a student from scratch, in Hugging Face's names."""

    model_type: Literal["qwen2", "qwen3", "llama", "mistral", "smollm3", "gemma3_text"] = "qwen3"
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int | None = None
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True


@section
class LoraConfig:
    """YAML section `student.lora`: trains low-rank adapters beside frozen matrices (arXiv:2106.09685)."""

    rank: int = 16
    alpha: float = 32.0
    """The adapters' output is scaled by alpha / rank."""
    dropout: float = 0.0
    """Of the adapters' inputs."""
    targets: str | tuple[str, ...] = "all-linear"
    """Linear layers by Hugging Face's names (q_proj ... down_proj), or all of them."""
    base_dtype: Literal["float32", "bfloat16", "int8", "nf4"] = "float32"
    """Of the frozen model; bfloat16 halves it and loses nothing of a checkpoint that is stored so. int8 and nf4 (as in
    QLoRA, arXiv:2305.14314) quantize the layers' matrices."""


@section
class StudentConfig:
    """YAML section `student`: the model that is trained."""

    init: str | None = None
    """What to start from: a Hugging Face checkpoint (a folder or a repository id), or the folder `checkpoints` of
    another run of ours, whose newest parameters are taken; its tokenizer is the folder `tokenizer` of that run."""
    revision: str | None = None
    architecture: ArchitectureConfig | None = None
    """Instead of `init`: a small student from scratch."""
    tokenizer: str | None = None
    """Folder or repository id; `init`'s own if absent, then the teacher's. `train` trains a new one on the traces."""
    tokenizer_vocab: int = 4096
    """Size of the vocabulary that `tokenizer: train` makes."""
    lora: LoraConfig | None = None
    """Train adapters instead of the whole model."""

    def __post_init__(self):
        _require(
            (self.init is None) != (self.architecture is None),
            "student needs exactly one of `init` (a checkpoint) and `architecture` (a student from scratch).",
        )


@section
class MeshConfig:
    """YAML section `train.mesh`: devices along each axis; one axis may be -1, the devices that remain."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1
    slices: int | None = None
    """Groups of devices with fast links inside and a slower network between them (TPU slices, GPU hosts): the axis
    `data` runs over them, the others stay inside. If absent, the devices say which slice they belong to."""


@section
class OptimizerConfig:
    """YAML section `train.optimizer`."""

    name: Literal["adamw", "muon", "adafactor"] = "adamw"
    """`muon`: Muon on the layers' matrices, AdamW on embeddings and vectors (Jordan et al. 2024). `adafactor`: second
    moments as one row and one column a matrix, no first ones (Shazeer & Stern 2018): least memory."""
    learning_rate: float
    """The peak; Adafactor's is relative to the size of each parameter (its paper, section 8), so 1e-3 to 1e-2 there."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after the warmup; `wsd` holds the rate, then lowers it over the last `decay_share` of the steps."""
    warmup_share: float = 0.03
    decay_share: float = 0.4
    final_share: float = 0.0
    """The last step's learning rate, as a share of the peak."""
    weight_decay: float = 0.0
    """Matrices only: norms, biases and embeddings are never decayed."""
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0

    def __post_init__(self):
        _require(self.learning_rate > 0, f"train.optimizer.learning_rate is {self.learning_rate}; set it above 0.")
        for name in ("warmup_share", "decay_share", "final_share"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"train.optimizer.{name} is {value}; set a share in 0..1.")


@section
class TrainEvaluateConfig:
    """YAML section `train.evaluate`: what is measured while training goes on."""

    every: int
    """Steps between evaluations; there is one after the last step too."""
    rows: int = 0
    """Packed rows that are taken out of training, for the evaluation loss and the token accuracy by region; 0 for
    none."""
    problems: int = 0
    """Held-out problems (the first ones) that are answered greedily and marked; 0 for none."""
    max_tokens: int = 256
    """Of such an answer."""

    def __post_init__(self):
        _require(self.every >= 1, f"train.evaluate.every is {self.every}; set at least 1.")
        for name in ("rows", "problems"):
            _require(getattr(self, name) >= 0, f"train.evaluate.{name} is {getattr(self, name)}; set 0 or more.")
        _require(
            self.rows + self.problems > 0, "train.evaluate measures nothing; set `rows`, `problems` or both above 0."
        )
        _require(self.max_tokens >= 1, f"train.evaluate.max_tokens is {self.max_tokens}; set at least 1.")


@section
class ProfileConfig:
    """YAML section `train.profile`: a trace of some steps by jax.profiler, below `checkpoints/profile`."""

    start: int
    """The first step of the trace, counted from 0; take one after compilation."""
    steps: int = 3

    def __post_init__(self):
        _require(
            self.start >= 0 and self.steps >= 1, "train.profile needs `start` of 0 or more and `steps` of 1 or more."
        )


@section
class TrainConfig:
    """YAML section `train`: the masked sequence loss on packed rows."""

    batch_rows: int
    """Rows in one optimizer step, over all devices and micro-batches."""
    epochs: float | None = None
    steps: int | None = None
    micro_batches: int = 1
    """A step's rows are taken in this many parts, whose sums are added before the one division."""
    optimizer: OptimizerConfig
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Inputs of matrix products; results, parameters and sums are always fp32."""
    remat: Literal["none", "attention", "dots", "full"] = "none"
    mesh: MeshConfig = MeshConfig()
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept."""
    keep_best: int = 0
    """How many of the checkpoints with the lowest evaluation loss are kept beside them; every evaluation saves then."""
    accept_changed: tuple[str, ...] = ()
    """Keys, such as `train.optimizer.learning_rate` or a whole section, in which the checkpoint that is continued may
    differ from this config. Any other difference is refused."""
    log_every: int = 10
    evaluate: TrainEvaluateConfig | None = None
    on_bad_step: Literal["stop", "skip"] = "stop"
    """When loss or gradient are not finite, or the loss is a `spike`. The update of such a step is never applied, and
    its batch is written to `checkpoints/bad_steps.jsonl`; `skip` goes on with the next one."""
    spike: float | None = None
    """A loss this many times its running mean counts as a bad step; none does if absent."""
    max_skipped: int = 50
    """`skip` gives up after this many bad steps in a row."""
    tensorboard: bool = True
    """Write TensorBoard's files below `checkpoints/tensorboard`."""
    wandb: str | None = None
    """A Weights & Biases project to log to; needs `pip install wandb`."""
    profile: ProfileConfig | None = None
    peak_tflops: float | None = None
    """Peak of one device in TFLOP/s, for the MFU; if absent, that of its kind where it is known."""
    thinking_weight: float = 1.0
    answer_weight: float = 1.0

    def __post_init__(self):
        _require((self.epochs is None) != (self.steps is None), "train needs exactly one of `epochs` and `steps`.")
        for name in ("batch_rows", "micro_batches", "checkpoint_every", "keep_checkpoints", "log_every", "max_skipped"):
            _require(getattr(self, name) >= 1, f"train.{name} is {getattr(self, name)}; set at least 1.")
        _require(self.spike is None or self.spike > 1, f"train.spike is {self.spike}; set a factor above 1.")
        _require(
            self.peak_tflops is None or self.peak_tflops > 0,
            f"train.peak_tflops is {self.peak_tflops}; set it above 0.",
        )
        _require(
            self.keep_best == 0 or (self.evaluate is not None and self.evaluate.rows > 0),
            "train.keep_best goes by the evaluation loss; set `train.evaluate: {every: N, rows: M}`.",
        )
        _require(
            self.batch_rows % self.micro_batches == 0,
            f"train.batch_rows={self.batch_rows} is not a multiple of train.micro_batches={self.micro_batches}.",
        )


@section
class ExportConfig:
    """YAML section `export`: the student in Hugging Face format."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    max_shard_gib: float = 4.0
    lora: Literal["merged", "adapter"] = "merged"
    """Of a student with adapters: the whole model, or the adapters alone as PEFT loads them."""
    check: Literal["transformers", "none"] = "transformers"
    """Reload with transformers and compare logits, before the folder gets its final name."""
    serve: bool = False
    """Start vLLM's server on the student's export and let it answer one held-out problem."""
    port: int = 0
    """Of that server; 0 takes a free one."""


@section
class EvaluateConfig:
    """YAML section `evaluate`: held-out accuracy of student, baselines and teacher."""

    problems: ProblemsConfig
    engine: Literal["jax", "vllm"] = "jax"
    models: tuple[str, ...] = ("teacher", "student", "baselines")
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int = 0
    batch: int = 256
    vllm: VLLMConfig = VLLMConfig()

    def __post_init__(self):
        known = {"teacher", "student", "baselines"}
        for name in self.models:
            _require(name in known, f"evaluate.models has {name!r}; known are {', '.join(sorted(known))}.")


@section
class RunConfig:
    """One YAML file: a whole run, from problems to report."""

    name: str
    run_dir: str
    seed: int = 0
    problems: ProblemsConfig
    traces: TracesConfig
    verify: VerifyConfig = VerifyConfig()
    data: DataConfig
    student: StudentConfig
    train: TrainConfig
    export: ExportConfig = ExportConfig()
    evaluate: EvaluateConfig | None = None
    baselines: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """More students on the same traces: a name, and what differs, as `data.response: answer`."""

    def __post_init__(self):
        _require(
            self.export.lora == "merged" or (self.student.lora is not None and self.student.init is not None),
            "export.lora: adapter needs `student.lora`, and `student.init`, the checkpoint that the adapter is for.",
        )
        _require(
            self.export.lora == "merged" or self.evaluate is None or self.evaluate.engine == "jax",
            "export.lora: adapter is evaluated by `evaluate.engine: jax` alone; vLLM needs export.lora: merged.",
        )
        for name in self.baselines:
            _require(
                name.replace("_", "").replace("-", "").isalnum() and name not in {"student", "teacher"},
                f"baselines.{name}: use letters, digits, - and _, and not the names `student` or `teacher`.",
            )
