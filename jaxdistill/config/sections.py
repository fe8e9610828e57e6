"""One frozen dataclass per YAML section; every section checks its own values."""

from __future__ import annotations

import dataclasses
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

    source: Literal["demo", "gsm8k", "jsonl"]
    path: str | None = None
    """The file (`gsm8k`, `jsonl`): one JSON object a line."""
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
    python: str | None = None
    """Interpreter of an environment with vLLM in it; if absent, that of JAXDISTILL_VLLM_PYTHON, or else our own."""

    @property
    def interpreter(self) -> str:
        return self.python or os.environ.get("JAXDISTILL_VLLM_PYTHON") or sys.executable


@section
class TracesConfig:
    """YAML section `traces`: who writes the traces, and how they are sampled."""

    engine: Literal["vllm", "jax", "import"]
    """`vllm`: offline engine in its own process. `jax`: the embedded decoder. `import`: the problems' own solutions."""
    teacher: str | None = None
    """A Hugging Face folder or repository id; `demo` is the small teacher that ships with the package."""
    revision: str | None = None
    system: str | None = None
    """System prompt, put before the problem."""
    suffix: str = ""
    """Added to the problem's text, such as an instruction to box the answer."""
    samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int = 0
    batch: int = 256
    """Rows decoded at once by the JAX engine; vLLM has `vllm.max_num_seqs`."""
    vllm: VLLMConfig = VLLMConfig()

    def __post_init__(self):
        _require(self.samples >= 1, f"traces.samples is {self.samples}; sample at least once a problem.")
        _require(self.temperature >= 0, f"traces.temperature is {self.temperature}; set 0 (greedy) or more.")
        _require(0 < self.top_p <= 1, f"traces.top_p is {self.top_p}; set a share in (0, 1].")
        _require(self.max_tokens >= 1, f"traces.max_tokens is {self.max_tokens}; set at least 1.")
        if self.engine != "import":
            _require(self.teacher is not None, f"traces.engine: {self.engine} needs `traces.teacher`, a checkpoint.")


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


@section
class DataConfig:
    """YAML section `data`: from kept traces to packed rows."""

    row_tokens: int
    """Length of a packed row, T."""
    response: Literal["reasoning", "answer"] = "reasoning"
    """What is imitated: thinking and answer, or the answer behind an empty thinking (the answer-only baseline)."""
    overlong: Literal["error", "drop"] = "error"
    """An example longer than a row is never cut: refuse it, or drop it and count it."""
    system: str | None = None
    suffix: str = ""

    def __post_init__(self):
        _require(self.row_tokens >= 2, f"data.row_tokens is {self.row_tokens}; a row needs at least 2 tokens.")


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
