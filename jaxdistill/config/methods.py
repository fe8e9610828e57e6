"""Config of what single methods of the literature add to data and training."""

from __future__ import annotations

from typing import Literal

from jaxdistill.config.base import require, section
from jaxdistill.config.traces import VLLMConfig


@section
class PairsConfig:
    """YAML section `data.pairs`: kept traces, each beside a wrong one of the same problem, for `train.contrastive`.

    Wrong are traces that passed every filter but that of the answer: finished, well formed, and incorrect. Those of the
    teacher come first; a problem with none has no pair, unless `edits` makes one.
    """

    per_problem: int = 1
    """At most so many pairs a problem; every trace is in one pair at most."""
    edits: bool = False
    """Where the teacher made no mistake: the kept trace with one number of its reasoning changed, in all that follows
    too, and another final answer. It is wrong in that number alone, so it is less plausible than a real mistake."""
    span: Literal["response", "step"] = "response"
    """What of the two is contrasted: all, or the first step (line) in which they differ, from the first token that does
    on (Step-DPO, arXiv:2406.18629). What follows a wrong step follows from it, and is no mistake."""

    def __post_init__(self):
        require(self.per_problem >= 1, f"data.pairs.per_problem is {self.per_problem}; set at least 1.")


@section
class ContrastiveConfig:
    """YAML section `train.contrastive`: a loss of pairs (`data.pairs`) beside the cross-entropy, in the same step.

    The step's loss is lm_weight * (mean over the trained tokens of the packed rows) + weight * (mean over the pairs of
    its own rows of pairs). The defaults of beta, gap and normalize are those of the form's paper; but the margin's gap
    is 0.1 nats a token, ours: the papers with a gap have it for whole responses, and 1 nat a token did harm.
    """

    form: Literal["margin", "dpo", "orpo", "simpo"] = "margin"
    """See `losses.preferences`. `dpo` measures against the student as it starts, so start from a trained one
    (`student.init`); its log-probabilities are computed once, before the first step."""
    weight: float = 1.0
    lm_weight: float = 1.0
    """0 leaves the pairs alone, as DPO's and SimPO's papers have it; the margin and ORPO need the cross-entropy."""
    batch_rows: int | None = None
    """Rows of pairs in one optimizer step; `train.batch_rows` if absent. A row holds as many pairs as fit into it."""
    beta: float | None = None
    gap: float | None = None
    normalize: bool | None = None
    """Whether log-probabilities are means over a response's tokens, and not sums."""

    def __post_init__(self):
        name = "train.contrastive"
        require(0 < self.weight < float("inf"), f"{name}.weight is {self.weight}; set it above 0, or leave {name} out.")
        require(0 <= self.lm_weight < float("inf"), f"{name}.lm_weight is {self.lm_weight}; set 0 or more.")
        require(self.beta is None or self.beta > 0, f"{name}.beta is {self.beta}; set it above 0.")
        require(
            self.batch_rows is None or self.batch_rows >= 1, f"{name}.batch_rows is {self.batch_rows}; set at least 1."
        )
        require(
            self.lm_weight > 0 or self.form in ("dpo", "simpo"),
            f"{name}.lm_weight is 0, and {self.form} alone does not keep the chosen trace likely; set it above 0.",
        )


@section
class OnPolicyConfig:
    """YAML section `train.on_policy`: the student's own answers, graded token by token by the teacher (GKD, MiniLLM).

    In every step some rows give up their place: their problems are answered by the student as it is then, and it learns
    from what the teacher (`grader`) thinks of every token, not from the tokens themselves. The other rows are learned
    from as `train.distill` says; its `weight: 0` leaves them the cross-entropy alone. All tokens, stored and sampled,
    make one sum, which is divided by their number.
    """

    max_tokens: int
    """Of an answer. One that is longer is cut off, and learned from as far as it goes."""
    fraction: float = 0.5
    """Share of a step's rows that are the student's own: lambda in GKD. 1 is on policy alone."""
    after: int = 0
    """So many steps learn from stored rows alone. A student that cannot answer at all shows the teacher nothing worth
    grading, so begin with a trained one (`student.init`), or wait."""
    divergence: Literal[
        "forward_kl", "reverse_kl", "jsd", "total_variation", "skew_kl", "skew_reverse_kl", "adaptive_kl"
    ] = "reverse_kl"
    """At every token of the answers, as in `train.distill`. Of servers' grades `forward_kl`, on `topk` tokens and one
    bucket for all others, or `reverse_kl`, estimated without bias from them and the sampled token."""
    parameter: float | None = None
    """Of the divergence."""
    weight: float = 1.0
    """Of the divergence, beside the loss of the stored rows."""
    temperature: float = 1.0
    """At which answers are sampled; the student's own distribution is 1."""
    rollouts: Literal["jax", "vllm"] = "jax"
    """Who answers: the decoder, on the training's own mesh, or vLLM beside the first process, set up by `vllm`."""
    vllm: VLLMConfig = VLLMConfig()
    """`dtype: auto` is `train.compute_dtype`. On accelerators vLLM and the training share the memory: lower
    `gpu_memory_utilization`, and XLA_PYTHON_CLIENT_MEM_FRACTION in the environment."""
    sync_every: int = 1
    """Steps between two times that vLLM is given the student's weights. Checkpoints are saved only then, so that a run
    that is resumed samples what it would have sampled."""
    grader: Literal["online", "server"] = "online"
    """Where the teacher is: on the training's own mesh (`train.distill: {source: online}`), or behind vLLM's servers,
    which `traces.teacher`, `traces.server` and `traces.vllm` tell of. A run that is resumed then is the same to the bit
    only if their logprobs are."""
    topk: int = 16
    """Of servers: so many likeliest tokens of the teacher at every token of the answers."""

    def rows_of(self, batch_rows: int) -> int:
        """How many of a batch's rows are the student's own."""
        return round(self.fraction * batch_rows)

    def __post_init__(self):
        name = "train.on_policy"
        require(0 < self.fraction <= 1, f"{name}.fraction is {self.fraction}; set a share in (0, 1], or drop {name}.")
        require(self.max_tokens >= 1, f"{name}.max_tokens is {self.max_tokens}; set at least 1.")
        require(self.after >= 0, f"{name}.after is {self.after}; set 0 or more steps.")
        require(0 < self.weight < float("inf"), f"{name}.weight is {self.weight}; set it above 0, or drop {name}.")
        require(
            0 < self.temperature < float("inf"),
            f"{name}.temperature is {self.temperature}; set it above 0: greedy answers are not the student's own ones.",
        )
        for key in ("sync_every", "topk"):
            require(getattr(self, key) >= 1, f"{name}.{key} is {getattr(self, key)}; set at least 1.")
        require(
            self.sync_every == 1 or self.rollouts == "vllm",
            f"{name}.sync_every={self.sync_every} is for rollouts: vllm; the decoder has the step's own weights.",
        )
        if self.grader == "server":
            self._check_served(name)

    def _check_served(self, name: str):
        require(
            self.divergence in ("forward_kl", "reverse_kl"),
            f"{name}.divergence: {self.divergence} needs the teacher's whole distribution; servers give its likeliest "
            "tokens, so set forward_kl or reverse_kl, or grader: online.",
        )
        require(
            self.divergence == "forward_kl" or (self.temperature == 1 and self.sync_every == 1),
            f"{name}.divergence: reverse_kl is estimated from what the student itself samples; set temperature and "
            "sync_every to 1, or forward_kl, or grader: online.",
        )


TEMPLATES = {
    "trace": "{problem}",
    "label": "{problem}",
    "rationale": "[rationale] {problem}",
    "next_step": "[next step] {problem}\n{steps}",
    "answer": "[answer] {problem}\n{steps}",
}


@section
class TaskConfig:
    """YAML section `data.tasks[i]`: one of several tasks that are made of every trace (Hsieh et al. 2023)."""

    kind: Literal["trace", "label", "rationale", "next_step", "answer"]
    """`trace`: the trace as it is. `label`: what stands behind the thinking, from the problem alone. `rationale`: the
    steps alone. `next_step`: each step from those before it. `answer`: what stands behind, from all steps."""
    prompt: str | None = None
    """The user's turn: {problem}, and for `next_step` and `answer` {steps}. The default of all but `trace` and `label`
    begins with the task's name in brackets. Evaluation asks with the problem alone (and `data.suffix`), so leave
    `trace` or `label` that prompt, whichever is wanted of the student in the end."""
    weight: float = 1.0
    """How often each example comes: 0.5 takes half of them, by a hash of their ids, and 2 takes each twice. It is the
    task's weight in the loss, which sums over tokens; so long rationales weigh more than short labels do."""

    @property
    def template(self) -> str:
        return TEMPLATES[self.kind] if self.prompt is None else self.prompt

    def __post_init__(self):
        require(
            0 < self.weight < float("inf"), f"data.tasks: the weight of {self.kind} is {self.weight}; set it above 0."
        )
        for hole in ("{problem}", "{steps}")[: 2 if self.kind in ("next_step", "answer") else 1]:
            require(
                self.template.count(hole) == 1,
                f"data.tasks: the prompt of {self.kind} has {hole} {self.template.count(hole)} times; put it in once.",
            )


@section
class StarConfig:
    """YAML section `star`: what `jaxdistill star` does round after round, each in a run folder of its own.

    A round samples from the student of the round before (`student.init` at first) as `traces` says, keeps what `verify`
    keeps, and trains from `student.init` anew. With `rationalize` it is STaR (Zelikman et al. 2022, arXiv:2203.14465,
    algorithm 1); without it, with several samples a problem, ReST-EM (Singh et al. 2023, arXiv:2312.06585, algorithm 1;
    `verify.keep_per_problem` is its cut-off), and with one round rejection-sampling fine-tuning (Yuan et al. 2023,
    arXiv:2308.01825, section 3.3). Baselines have no place in it, and are left out.
    """

    rounds: int = 5
    """At most so many."""
    rationalize: bool = True
    """Ask for the problems that were not solved once more, with the gold answer as a hint, and learn from what is right
    as if there had been no hint; traces that show it are left out."""
    hint: str = "{problem}\n\nHint: the answer is {answer}."
    """What is asked then."""
    plateau: float = 0.01
    """A round is on it whose accuracy on the held-out problems (without `evaluate`: the share of the problems that its
    attempts solved) is not at least so much above the best one before."""
    patience: int = 1
    """So many such rounds in a row end it."""

    def __post_init__(self):
        for name in ("rounds", "patience"):
            require(getattr(self, name) >= 1, f"star.{name} is {getattr(self, name)}; set at least 1.")
        require(0 <= self.plateau < 1, f"star.plateau is {self.plateau}; set a share in 0..1.")
        for hole in ("{problem}", "{answer}"):
            require(self.hint.count(hole) == 1, f"star.hint has {hole} {self.hint.count(hole)} times; put it in once.")
