"""Config of verification."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxdistill.config.base import require, section
from jaxdistill.config.cluster import RayConfig
from jaxdistill.config.traces import ServerConfig, VLLMConfig


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
            require(value > 0, f"verify.code.limits.{field.name} is {value}; set it above 0.")
        require(
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
class FiltersConfig:
    """YAML section `verify.filters`: thresholds of what `verify.quality` measures; absent is off.

    A `max_` is the most that is allowed, a `min_` the least. Prose is a text without its code and LaTeX.
    """

    max_foreign_script: float | None = None
    """Share of the prose's letters in scripts that the problem is not written in; 0.05 is strict."""
    max_other_language: float | None = None
    """Share of the prose in another language than `language`, or than most of it where that is absent; 0.3 is usual."""
    language: str | None = None
    """ISO 639-1 code of the language of `max_other_language`, such as `en`."""
    max_repeated_ngrams: float | None = None
    """Share of a response's 8-grams of words that stood in it before; 0.5 is usual. 0 for less than 100 words."""
    max_compression: float | None = 20.0
    """Bytes of a response for each that zlib needs; reasoning has 2 to 5. 1 for less than 1,000 bytes."""
    max_loop: int | None = 200
    """Words in a loop of 4 rounds or more that the thinking or the answer ends with."""
    min_thinking: int | None = None
    """Characters between the tags."""
    max_thinking: int | None = None
    min_answer: int | None = None
    """Characters behind the tags, or of the whole response without them."""
    max_answer: int | None = None
    min_steps: int | None = None
    """Lines of the thinking that hold a letter or a digit."""
    max_steps: int | None = None
    max_hedges: int | None = None
    """Hedges in the answer: maybe, I think, not sure, ..."""
    max_doubt: float | None = None
    """Hedges and changes of mind (wait, hmm, ...) for 1,000 words of thinking; 30 is much."""
    max_refusals: int | None = 0
    """Phrases at the start of an answer that refuse to give one."""
    max_echo: float | None = None
    """Share of a response's 8-grams of words that stand in the problem; 0.3 is much."""
    min_answer_place: float | None = None
    """Where in the thinking the answer is first stated, as a share of it; 0.1 drops what only justifies an answer."""
    max_open_ends: int | None = None
    """Code blocks, environments and displays of the answer that are never closed."""
    max_paragraph: int | None = None
    """Characters of prose without an empty line; R1's authors dropped long paragraphs as hard to read."""
    max_code: float | None = None
    """Share of a response's characters in code blocks."""
    max_symbols: float | None = None
    """Share of the prose's characters that are neither letters, digits, spaces nor ASCII's punctuation; 0.2 is much."""
    min_format_share: float | None = None
    """Share of the set's well-formed traces that have a trace's format: its tags, and how it states its answer."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "language" and value is not None:
                require(value >= 0, f"verify.filters.{field.name} is {value}; set 0 or more, or null for none.")
        require(
            self.language is None or (len(self.language) == 2 and self.language.islower()),
            f"verify.filters.language is {self.language}; give two small letters, such as en.",
        )


@section
class MajorityConfig:
    """YAML section `verify.majority`: of problems without a gold answer, the samples' own majority takes its place.

    Source: self-consistency, Wang et al. 2022, arXiv:2203.11171.
    """

    min_share: float = 0.5
    """Of a problem's traces, failed and truncated ones included, that give one answer."""
    min_votes: int = 3
    """Traces that give that answer."""

    def __post_init__(self):
        require(0 < self.min_share <= 1, f"verify.majority.min_share is {self.min_share}; set a share in (0, 1].")
        require(
            self.min_votes >= 2,
            f"verify.majority.min_votes is {self.min_votes}; set 2 or more, as one is no majority.",
        )


@section
class DecontaminateConfig:
    """YAML section `verify.decontaminate`: problems that stand in a benchmark are not learned from."""

    files: dict[str, str]
    """Benchmark -> its file or folder: JSON lines, JSON, Parquet or Arrow."""
    field: str | None = None
    """Where a row holds its question; if absent `question`, `problem` or `prompt`, whichever is there."""
    ngram: int = 10
    """Words; one n-gram in common is contamination. Of a shorter question all of it."""
    fuzzy: float | None = 0.7
    """So many of two questions' 3-grams of words in common, of all that they have (Jaccard), is contamination too."""

    def __post_init__(self):
        require(bool(self.files), "verify.decontaminate.files is empty; name at least one benchmark and its file.")
        require(self.ngram >= 3, f"verify.decontaminate.ngram is {self.ngram}; set at least 3 words; 8 to 13 is usual.")
        require(
            self.fuzzy is None or 0.3 <= self.fuzzy <= 1,
            f"verify.decontaminate.fuzzy is {self.fuzzy}; set a share in 0.3..1, or null for none.",
        )


@section
class JudgeConfig:
    """YAML section `verify.judge`: a model that reads well-formed traces and gives marks from 1 to 5. Off if absent."""

    engine: Literal["server", "vllm", "jax"] = "server"
    model: str
    """A Hugging Face folder or repository id; of a chat server only the name that is recorded."""
    revision: str | None = None
    min_faithfulness: int | None = None
    """Drop traces with a lower mark: does the answer follow from the thinking, and from nothing else?"""
    min_coherence: int | None = None
    """Drop traces with a lower mark: does each step follow from those before it?"""
    unparsed: Literal["keep", "drop"] = "keep"
    """What becomes of a trace that the judge gave no marks for."""
    attempts: int = 3
    """How often a trace is shown until the reply can be read; a server's own failures are retried by `server`."""
    temperature: float = 0.0
    """Of the first attempt; further ones are sampled at 0.7 at least, as the same reply would not help."""
    max_tokens: int = 2048
    max_characters: int = 60_000
    """Of a response that is shown; of a longer one the middle is left out."""
    batch: int = 64
    vllm: VLLMConfig = VLLMConfig()
    server: ServerConfig = ServerConfig(api="chat")

    def __post_init__(self):
        for name in ("min_faithfulness", "min_coherence"):
            mark = getattr(self, name)
            require(mark is None or 1 <= mark <= 5, f"verify.judge.{name} is {mark}; marks go from 1 to 5.")
        require(self.attempts >= 1, f"verify.judge.attempts is {self.attempts}; allow at least one.")
        require(self.temperature >= 0, f"verify.judge.temperature is {self.temperature}; set 0 (greedy) or more.")
        require(
            self.max_characters >= 1000,
            f"verify.judge.max_characters is {self.max_characters}; show at least 1,000.",
        )
        require(
            self.engine != "server" or bool(self.server.urls) or self.server.start > 0,
            "verify.judge.engine: server needs `verify.judge.server.urls`, or `.start: 1` to start one here.",
        )


@section
class VerifyConfig:
    """YAML section `verify`: which traces may be learned from."""

    answer: bool = True
    """Keep only traces whose final answer equals the gold answer; `undecided` is not kept."""
    think: Literal["required", "optional"] = "required"
    """Whether a trace must hold one non-empty `<think>...</think>` before its answer."""
    filters: FiltersConfig = FiltersConfig()
    majority: MajorityConfig | None = None
    """For problems without a gold answer; they are not kept if absent."""
    judge: JudgeConfig | None = None
    drop_duplicates: bool = True
    """Drop a trace whose response is the same, character for character, as another one of its problem."""
    near_duplicates: float | None = None
    """Drop a trace that shares so many 5-grams of words with another one of its problem (Jaccard, by MinHash)."""
    near_duplicate_problems: float | None = None
    """The same for problems, over the whole set, by 3-grams: only the first of such problems keeps its traces."""
    decontaminate: DecontaminateConfig | None = None
    pass_rate: tuple[float, float] = (0.0, 1.0)
    """Keep problems whose share of correct traces lies between these: 0.1 to 0.9 drops too hard and too easy ones."""
    keep_per_problem: int | None = None
    """At most this many traces a problem; all of them if absent."""
    choose: Literal["first", "shortest", "diverse", "random"] = "first"
    """Which ones: the lowest sample numbers, the shortest responses, those least alike, or by the hash of their ids."""
    max_per_domain: int | None = None
    """At most this many traces a domain, chosen by the hash of their ids."""
    max_domain_share: float | None = None
    """No domain makes up more than this share of what is kept."""
    code: CodeConfig = CodeConfig()
    workers: int | None = None
    """Processes that judge; as many as there are processors if absent."""
    executor: Literal["local", "ray"] = "local"
    """Where they run: here, or as the workers of a Ray cluster (`verify.ray`, and `workers` is of no use)."""
    ray: RayConfig = RayConfig()

    def __post_init__(self):
        require(
            self.workers is None or self.workers >= 1,
            f"verify.workers is {self.workers}; at least 1 process has to work.",
        )
        for name in ("keep_per_problem", "max_per_domain"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"verify.{name} is {value}; keep at least 1, or drop the key.")
        for name in ("near_duplicates", "near_duplicate_problems", "max_domain_share"):
            value = getattr(self, name)
            require(value is None or 0 < value <= 1, f"verify.{name} is {value}; set a share in (0, 1], or null.")
        low, high = self.pass_rate
        require(0 <= low <= high <= 1, f"verify.pass_rate is {[low, high]}; give two shares in 0..1, the lower first.")
        require(
            self.answer or (self.majority is None and (low, high) == (0, 1)),
            "verify.majority and verify.pass_rate go by answers, which verify.answer: false does not look at.",
        )
