"""Config of training: mesh, optimizer, evaluation while training, profile, loop."""

from __future__ import annotations

from typing import Literal

from jaxdistill.config.base import require, section
from jaxdistill.config.methods import ContrastiveConfig, OnPolicyConfig


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

    def __post_init__(self):
        sizes = {axis: getattr(self, axis) for axis in ("data", "fsdp", "tensor", "context")}
        written = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        require(
            all(size >= 1 or size == -1 for size in sizes.values()), f"train.mesh: {written}; set sizes of 1 or more."
        )
        require(
            list(sizes.values()).count(-1) <= 1, f"train.mesh: {written}; only one axis may be -1 (fsdp is, if absent)."
        )


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
        require(self.learning_rate > 0, f"train.optimizer.learning_rate is {self.learning_rate}; set it above 0.")
        for name in ("warmup_share", "decay_share", "final_share"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"train.optimizer.{name} is {value}; set a share in 0..1.")


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
        require(self.every >= 1, f"train.evaluate.every is {self.every}; set at least 1.")
        for name in ("rows", "problems"):
            require(getattr(self, name) >= 0, f"train.evaluate.{name} is {getattr(self, name)}; set 0 or more.")
        require(
            self.rows + self.problems > 0, "train.evaluate measures nothing; set `rows`, `problems` or both above 0."
        )
        require(self.max_tokens >= 1, f"train.evaluate.max_tokens is {self.max_tokens}; set at least 1.")


@section
class ProfileConfig:
    """YAML section `train.profile`: a trace of some steps by jax.profiler, below `checkpoints/profile`."""

    start: int
    """The first step of the trace, counted from 0; take one after compilation."""
    steps: int = 3

    def __post_init__(self):
        require(
            self.start >= 0 and self.steps >= 1, "train.profile needs `start` of 0 or more and `steps` of 1 or more."
        )


@section
class DistillConfig:
    """YAML section `train.distill`: the student learns the teacher's distributions too, not its tokens alone.

    The loss is `ce_weight` times the cross-entropy plus `weight` times a divergence, token by token, with the regions'
    weights on both; a token without a distribution of the teacher has the cross-entropy alone. One sum over the batch
    is divided by the sum of the regions' weights. (Hinton et al. 2015, arXiv:1503.02531; Kim & Rush 2016.)
    """

    source: Literal["stored", "online"]
    """`stored`: what `data.topk` keeps beside the tokens, without a teacher. `online`: a teacher on the same mesh."""
    divergence: Literal[
        "forward_kl", "reverse_kl", "jsd", "total_variation", "skew_kl", "skew_reverse_kl", "adaptive_kl", "uld"
    ] = "forward_kl"
    """Forward is KL(teacher || student); see `losses.divergences`. Stored distributions have the forward KL alone, or
    `uld`, the approximate one between different tokenizers (`losses.ranks`), with `data.topk_align: spans`."""
    parameter: float | None = None
    """Of the divergence: beta of `jsd`, alpha of the skewed ones, mu of `adaptive_kl`; their papers' if absent."""
    weight: float = 1.0
    final_weight: float | None = None
    """What `weight` has become at the last step; it stays as it is if absent."""
    schedule: Literal["linear", "cosine"] = "linear"
    """The way from `weight` to `final_weight`."""
    ce_weight: float = 1.0
    """0 leaves the divergence alone; `1 - weight` makes the mixture that some papers write."""
    temperature: float = 1.0
    """Divides both models' logits in the divergence, which then carries temperature**2. Stored distributions have the
    temperature at which they were taken (`traces.logprobs_temperature`), and no other."""
    teacher: str | None = None
    """Online: a Hugging Face folder or repository id; `traces.teacher` if absent."""
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "int8", "nf4"] = "bfloat16"
    """Online: how the teacher's parameters are kept."""
    replicate: bool = False
    """Online: a whole teacher on every device along `train.mesh.fsdp`, which then has nothing to gather each step."""

    @property
    def distills(self) -> bool:
        """Whether the divergence has any weight at all."""
        return self.weight > 0 or (self.final_weight or 0) > 0

    def __post_init__(self):
        name = "train.distill"
        for key in ("weight", "ce_weight", "final_weight"):
            value = getattr(self, key)
            require(value is None or 0 <= value < float("inf"), f"{name}.{key} is {value}; set 0 or more.")
        ends = {self.weight, self.weight if self.final_weight is None else self.final_weight}
        require(
            self.ce_weight > 0 or 0 not in ends,
            f"{name}: ce_weight is 0 and the divergence's weight is 0 at one end, where nothing would be learned; "
            "raise one of them.",
        )
        require(self.temperature > 0, f"{name}.temperature is {self.temperature}; set it above 0.")
        if self.source == "online":
            require(self.divergence != "uld", f"{name}.divergence: uld is for source: stored; choose another.")
            return
        require(
            self.divergence in ("forward_kl", "uld"),
            f"{name}.divergence: {self.divergence} needs the teacher's whole distribution; stored are its likeliest "
            "tokens, so set forward_kl, or source: online.",
        )
        require(
            self.temperature == 1 or self.divergence == "forward_kl",
            f"{name}.divergence: {self.divergence} knows no temperature; set 1.",
        )
        require(
            self.teacher is None and self.revision is None,
            f"{name}.teacher is for source: online; stored distributions are those of the traces' teacher.",
        )


@section
class TrainConfig:
    """YAML section `train`: the masked sequence loss on packed rows."""

    batch_rows: int
    """Rows in one optimizer step, over all devices and micro-batches."""
    epochs: float | None = None
    steps: int | None = None
    micro_batches: int | None = None
    """A step's rows are taken in this many parts, whose sums are added before the one division; if absent, in one, and
    on CPUs in parts that stay near the caches (`train.defaults`)."""
    optimizer: OptimizerConfig
    contrastive: ContrastiveConfig | None = None
    distill: DistillConfig | None = None
    on_policy: OnPolicyConfig | None = None
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Inputs of matrix products, and on accelerators their results and what is kept for the backward pass; parameters,
    optimizer, norms, softmax, losses and all sums are always fp32. `auto`: bfloat16, but float32 on CPUs that have no
    units for bf16, where it is faster. `float32` means full precision on every device (no TF32, no bf16 passes)."""
    remat: Literal["auto", "none", "dots", "attention", "offload", "full"] = "auto"
    """What the backward pass finds saved of each layer; the rest is computed again. `none`: everything. `dots`: results
    of matrix products and of attention. `attention`: attention's results. `offload`: the layer's input and attention's
    results, in the host's memory (GPUs and TPUs). `full`: the layer's input alone. `auto`: `none` on CPUs; on
    accelerators the first of `dots`, `attention` and `full` that the device's memory holds, by an estimate."""
    attention: Literal["auto", "triton", "cudnn", "splash", "blocks", "dense"] = "auto"
    """The kernel. `auto`: on TPUs `splash`; on GPUs `triton` for packed rows, `cudnn` for rows of one segment; on CPUs
    `dense` for short rows, `blocks` for others. Where a GPU lacks one, the next best is taken, with a warning."""
    deterministic: bool = False
    """On GPUs: the same bits in every run, after a resume too. XLA leaves out operations that add in no fixed order and
    chooses kernels without timing them, which costs speed. CPUs and TPUs repeat themselves without it."""
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
        require((self.epochs is None) != (self.steps is None), "train needs exactly one of `epochs` and `steps`.")
        for name in ("batch_rows", "checkpoint_every", "keep_checkpoints", "log_every", "max_skipped"):
            require(getattr(self, name) >= 1, f"train.{name} is {getattr(self, name)}; set at least 1.")
        require(
            not (self.deterministic and self.attention == "cudnn"),
            "train.attention: cudnn adds gradients in any order, and train.deterministic is true; set attention: auto.",
        )
        require(self.spike is None or self.spike > 1, f"train.spike is {self.spike}; set a factor above 1.")
        require(
            self.peak_tflops is None or self.peak_tflops > 0,
            f"train.peak_tflops is {self.peak_tflops}; set it above 0.",
        )
        require(
            self.keep_best == 0 or (self.evaluate is not None and self.evaluate.rows > 0),
            "train.keep_best goes by the evaluation loss; set `train.evaluate: {every: N, rows: M}`.",
        )
        require(
            self.micro_batches is None or self.micro_batches >= 1,
            f"train.micro_batches is {self.micro_batches}; set at least 1, or leave it out.",
        )
        require(
            self.batch_rows % (self.micro_batches or 1) == 0,
            f"train.batch_rows={self.batch_rows} is not a multiple of train.micro_batches={self.micro_batches}.",
        )
        self._check_teacher()

    def _check_teacher(self):
        d, own = self.distill, self.on_policy
        require(
            d is None or d.distills or own is not None,
            "train.distill.weight is 0, so that nothing is distilled; set it above 0, or leave train.distill out.",
        )
        if own is None:
            return
        online = d is not None and d.source == "online"
        require(
            online or own.grader == "server",
            "train.on_policy needs a teacher beside the student, who grades; set `train.distill: {source: online}`, or "
            "train.on_policy.grader: server.",
        )
        require(
            not online or own.grader == "online",
            "train.on_policy.grader: server, and train.distill has a teacher on the mesh too; set grader: online, or "
            "leave train.distill out.",
        )
        require(
            self.checkpoint_every % own.sync_every == 0
            and (self.keep_best == 0 or self.evaluate is None or self.evaluate.every % own.sync_every == 0),
            f"train.on_policy.sync_every={own.sync_every}: checkpoints are saved only when vLLM is given weights; make "
            "train.checkpoint_every, and train.evaluate.every where keep_best goes by it, multiples of it.",
        )
        require(
            d is None or d.distills or d.ce_weight == 1,
            "train.distill: weight is 0, which leaves the stored rows the cross-entropy alone; leave ce_weight at 1.",
        )
        require(
            own.rows_of(self.batch_rows) >= 1,
            f"train.on_policy.fraction={own.fraction} of batch_rows={self.batch_rows} is no row; raise one of them.",
        )
        require(self.contrastive is None, "train.on_policy and train.contrastive do not go together; drop one of them.")
