"""Rows that are decoded together: what is compiled, and the device's side of a batch.

Dimension key: B rows, G prompts of a group, T prompt tokens, R steps of a chunk, N rows that are filled at once,
V vocabulary. Caches lie as `models.attention.cached` says.

Everything that is compiled takes the weights as an argument, so other weights of the same config compile nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxdistill.generate import sampling
from jaxdistill.models import Decoder, ModelConfig
from jaxdistill.models.attention import platform_of
from jaxdistill.models.attention.cached import KV
from jaxdistill.models.quantize import dense
from jaxdistill.parallel import mesh as meshes

CHUNK = 16
"""Steps between two looks of the host for rows that have ended."""

INSERTED = 16
"""Rows that one call fills."""


class Kind(NamedTuple):
    """What of the sampling parameters is compiled."""

    greedy: bool
    top_k: bool
    nucleus: bool


class Numbers(NamedTuple):
    """What of the sampling parameters is not."""

    temperature: Any
    top_k: Any
    top_p: Any
    stop_ids: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """How tokens are drawn, and which end an output."""

    temperature: float
    top_k: int
    top_p: float
    stop_ids: tuple[int, ...]

    @property
    def kind(self) -> Kind:
        if self.temperature == 0:
            return Kind(greedy=True, top_k=False, nucleus=False)
        return Kind(greedy=False, top_k=self.top_k > 0, nucleus=self.top_p < 1)

    @property
    def numbers(self) -> Numbers:
        stop_ids = np.array(self.stop_ids, np.int32)
        return Numbers(np.float32(self.temperature), np.int32(self.top_k), np.float32(self.top_p), stop_ids)


class Weights(NamedTuple):
    """A model's parameters as decoding wants them: layers apart, matrices in the dtype of their products."""

    params: Any
    """All parameters; embedding and final norm are used."""
    layers: list[dict[str, jax.Array]]
    projection: jax.Array


class State(NamedTuple):
    """What is known of each row, all [B]."""

    token: jax.Array
    """The last one that was drawn; it has no keys and values yet."""
    length: jax.Array
    """Tokens in the cache."""
    count: jax.Array
    """Tokens drawn so far."""
    limit: jax.Array
    seed: jax.Array
    sample: jax.Array
    done: jax.Array


class Prefilled(NamedTuple):
    """A group of prompts: logits [G, V] after each, and keys and values of T slots a layer."""

    logits: jax.Array
    caches: list[KV]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row that takes up a request."""

    row: int
    source: int
    """Which prompt of its group."""
    length: int
    limit: int
    seed: int
    sample: int


class Engine:
    """A model with its weights made ready, and how its tokens are drawn.

    The weights are laid out once, and on a mesh gathered along the axis "embed" is split over, which would otherwise
    happen at every token: beside the model, memory holds them once more in the model's dtype, split over "tensor".
    """

    def __init__(self, model: Decoder, sampler: Sampler):
        self.model, self.sampler = model, sampler
        self.graph, state = nnx.split(model)
        self.fused = _fused(model)
        self.programs = programs(tuple((model.compiler_options or {}).items()))
        self.weights = Weights(state, *self.programs.lay_out(self.graph, self.fused, state))
        self.compiling, self.compiled = threading.Lock(), set[tuple[int, int]]()
        # an accelerator works on the next chunk while the host looks at the last one; on CPUs they are the same
        self.ahead = platform_of(model.mesh) != "cpu"

    def prefill(self, prompts: Sequence[Sequence[int]], *, rows: int, width: int) -> Prefilled:
        """Runs up to `rows` prompts of up to `width` tokens; what is computed has that very shape, always."""
        tokens, length = np.zeros((rows, width), np.int32), np.ones(rows, np.int32)
        for i, prompt in enumerate(prompts):
            tokens[i, : len(prompt)] = prompt
            length[i] = len(prompt)
        return self.programs.prefill(self.graph, self.fused, self.weights, tokens, length)


def _fused(model: Decoder) -> bool:
    """Whether a token step is `fused.step`; the kernels it needs are imported on GPUs alone."""
    if platform_of(model.mesh) != "gpu":
        return False
    from jaxdistill.generate import fused

    return fused.usable(model)


class Rows:
    """B rows of a cache; each is free, or works on a request of its own."""

    def __init__(self, engine: Engine, size: int, slots: int):
        self.engine, self.size, self.slots = engine, size, slots
        c, dtype = engine.model.config, engine.model.dtype
        self._cache, self._state = _empty(engine.model.mesh, c, dtype, size, slots)
        self._begun: Any = None

    def resize(self, slots: int) -> None:
        """Makes caches longer or shorter."""
        if slots != self.slots:
            self._cache = _resize(self.engine.model.mesh, slots, self._cache)
            self.slots = slots

    @property
    def begun(self) -> int:
        """Steps that rows have been told to take, and that `run` has not given back yet."""
        return 0 if self._begun is None else CHUNK

    def insert(self, prefilled: Prefilled, entries: Sequence[Entry]) -> None:
        """Puts prompts of one group into rows; their first tokens are drawn."""
        mesh, sampler = self.engine.model.mesh, self.engine.sampler
        nobody = Entry(self.size, 0, 1, 1, 0, 0)  # a row that does not exist
        for start in range(0, len(entries), INSERTED):
            some = list(entries[start : start + INSERTED])
            some += [nobody] * (INSERTED - len(some))
            columns = {
                field.name: np.array([getattr(entry, field.name) for entry in some], np.uint32)
                for field in dataclasses.fields(Entry)
            }
            self._cache, self._state = self.engine.programs.insert(
                mesh, sampler.kind, self._cache, self._state, prefilled, columns, sampler.numbers
            )

    def run(self, ahead: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One chunk of steps; fewer if all rows are done.

        Args:
          ahead: begins one more, which the next call gives back; what is done to rows until then comes after it.
        Returns:
          (tokens [B, 1 + R]: the last one from before, then the new ones; how many each row has drawn in all [B];
          whether it is done [B]).
        """
        news = self._begin() if self._begun is None else self._begun
        self._begun = self._begin() if ahead else None
        return jax.device_get(news)

    def _begin(self) -> Any:
        shape = (self.size, self.slots)
        if shape in self.engine.compiled:
            return self._dispatch()
        with self.engine.compiling:  # or two threads would compile the same
            news = jax.block_until_ready(self._dispatch())
            self.engine.compiled.add(shape)
            return news

    def _dispatch(self) -> Any:
        e = self.engine
        self._cache, self._state, news = e.programs.chunk(
            e.graph, e.sampler.kind, e.fused, e.weights, self._cache, self._state, e.sampler.numbers
        )
        return news


def _lay_out(graph: Any, fused: bool, state: Any) -> tuple[list[dict[str, jax.Array]], jax.Array]:
    model: Decoder = nnx.merge(graph, state)
    rules = {**meshes.RULES, "embed": None}

    def placed(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
        if model.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, meshes.sharding(model.mesh, tuple(axes), rules=rules))

    layers: list[dict[str, jax.Array]] = [{} for _ in model.config.kinds]
    for name, param in nnx.state(model.layers).items():
        stacked, axes = dense(param.get_value()), param.get_metadata()["axes"]
        for i, layer in enumerate(layers):
            # vectors are biases and scales, which are used in fp32
            layer[name] = placed(stacked[i].astype(model.dtype) if stacked.ndim == 3 else stacked[i], axes[1:])
    if fused:
        from jaxdistill.generate.fused import packed

        layers = [packed(model.config, layer) for layer in layers]
    return layers, placed(model.projection().astype(model.dtype), ("vocab", "embed"))


def _prefill(graph: Any, fused: bool, weights: Weights, tokens_GT: jax.Array, length_G: jax.Array) -> Prefilled:
    model: Decoder = nnx.merge(graph, weights.params)
    tokens_GT = meshes.constrain(tokens_GT, ("batch", None), model.mesh)
    layers = weights.layers
    if fused:
        from jaxdistill.generate.fused import unpacked

        layers = [unpacked(model.config, layer) for layer in layers]
    logits_GV, caches = model.prefill(tokens_GT, length_G, layers, weights.projection)
    return Prefilled(logits_GV, _split(caches, model.mesh))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _empty(mesh: Mesh | None, config: ModelConfig, dtype: Any, rows: int, slots: int) -> tuple[list[KV], State]:
    zeros_B, none_B = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.uint32)
    state = State(zeros_B, zeros_B, zeros_B, zeros_B, none_B, none_B, jnp.ones(rows, bool))
    return _split(_no_tokens(config, dtype, rows, slots), mesh), state


@functools.partial(jax.jit, static_argnums=(0, 1))
def _resize(mesh: Mesh | None, slots: int, cache: list[KV]) -> list[KV]:
    return _split([kv.resized(slots) for kv in cache], mesh)


def _insert(
    mesh: Mesh | None, kind: Kind, cache: list[KV], state: State, prefilled: Prefilled, entries: dict[str, jax.Array],
    numbers: Numbers,
) -> tuple[list[KV], State]:  # fmt: skip
    """Copies prompts' caches into rows, and draws their first tokens; `entries` are the columns of N `Entry`s."""
    row_N, source_N = entries["row"], entries["source"]

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[row_N].set(new[source_N].astype(old.dtype), mode="drop")

    # empty slots overwrite all that the row's last owner left
    filled = [kv.resized(cache[0].slots) for kv in prefilled.caches]
    cache = [KV(*map(put, old, new)) for old, new in zip(cache, filled, strict=True)]
    none_N, one_N = jnp.zeros_like(row_N), jnp.ones_like(row_N)
    seed_N, sample_N, limit_N = (entries[name] for name in ("seed", "sample", "limit"))
    token_N = _pick(prefilled.logits[source_N], seed_N, sample_N, none_N, kind, numbers)
    done_N = _is_any(token_N, numbers.stop_ids) | (limit_N <= 1)
    new = State(token_N, entries["length"], one_N, limit_N, seed_N, sample_N, done_N)
    state = State(*(o.at[row_N].set(n.astype(o.dtype), mode="drop") for o, n in zip(state, new, strict=True)))
    return _split(cache, mesh), state


def _chunk(
    graph: Any, kind: Kind, fused: bool, weights: Weights, cache: list[KV], state: State, numbers: Numbers
) -> tuple[list[KV], State, Any]:
    """Up to R steps; see `Rows.run`."""
    model: Decoder = nnx.merge(graph, weights.params)
    B = state.token.shape[0]
    step = _fused_step(model, weights) if fused else _general_step(model, weights, cache)

    def one_token(at, carry):
        state, held, tokens = carry
        logits, held = step(at, state, held)
        token = _pick(logits, state.seed, state.sample, state.count, kind, numbers)
        count = state.count + ~state.done
        done = state.done | _is_any(token, numbers.stop_ids) | (count >= state.limit)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], at + 1, axis=1)
        return state._replace(token=token, count=count, done=done), _split(held, model.mesh), tokens

    def going_on(carry):
        at, (state, _, _) = carry
        return (at < CHUNK) & ~jnp.all(state.done)

    tokens = jnp.concatenate([state.token[:, None], jnp.zeros((B, CHUNK), jnp.int32)], axis=1)
    # the part of the cache that steps write to
    held = cache if fused else _split(_no_tokens(model.config, model.dtype, B, CHUNK), model.mesh)
    carry = (state, held, tokens)
    if platform_of(model.mesh) == "gpu":
        # a loop whose end is known is not looked at by the host between its rounds
        at, (state, held, tokens) = jnp.int32(CHUNK), jax.lax.fori_loop(0, CHUNK, one_token, carry)
    else:
        at, (state, held, tokens) = jax.lax.while_loop(
            going_on, lambda c: (c[0] + 1, one_token(*c)), (jnp.int32(0), carry)
        )
    cache = held if fused else [old.written(new, state.length) for old, new in zip(cache, held, strict=True)]
    # what the host reads is whole on every device
    news = tuple(meshes.constrain(x, (None,) * x.ndim, model.mesh) for x in (tokens, state.count, state.done))
    return _split(cache, model.mesh), state._replace(length=state.length + at), news


class Programs(NamedTuple):
    """The functions above, compiled."""

    lay_out: jax.stages.Wrapped
    prefill: jax.stages.Wrapped
    insert: jax.stages.Wrapped
    chunk: jax.stages.Wrapped


@functools.cache
def programs(options: tuple[tuple[str, Any], ...] = ()) -> Programs:
    """
    Args:
      options: of the compiler, as items, see `Decoder.compiler_options`.
    """
    jit = functools.partial(jax.jit, compiler_options=dict(options) or None)
    return Programs(
        lay_out=jit(_lay_out, static_argnums=(0, 1)),
        prefill=jit(_prefill, static_argnums=(0, 1)),
        insert=jit(_insert, static_argnums=(0, 1), donate_argnums=(2, 3)),
        chunk=jit(_chunk, static_argnums=(0, 1, 2), donate_argnums=(4, 5)),
    )


Step = Callable[[jax.Array, State, list[KV]], tuple[jax.Array, list[KV]]]
"""(which of the chunk it is, state, what it writes to) -> (logits [B, V], the same, written)."""


def _general_step(model: Decoder, weights: Weights, cache: list[KV]) -> Step:
    def step(at, state, recent):
        return model.step(state.token, cache, recent, state.length, at, weights.layers, weights.projection)

    return step


def _fused_step(model: Decoder, weights: Weights) -> Step:
    from jaxdistill.generate import fused

    interpret = platform_of(model.mesh) != "gpu"

    def step(at, state, cache):
        # rows that are done read nothing
        position = jnp.where(state.done, 0, state.length + at)
        return fused.step(
            model, state.token, position, cache, weights.layers, weights.projection, interpret=interpret
        )  # fmt: skip

    return step


def _is_any(token_B: jax.Array, ids: jax.Array) -> jax.Array:
    """Whether each token is one of a few: one comparison after the other, which is no kernel of its own."""
    found = jnp.zeros(token_B.shape, bool)
    for i in range(ids.shape[0]):
        found |= token_B == ids[i]
    return found


def _pick(
    logits_BV: jax.Array, seed_B: jax.Array, sample_B: jax.Array, position_B: jax.Array, kind: Kind, numbers: Numbers
) -> jax.Array:
    if kind.greedy:
        return sampling.greedy(logits_BV)

    def key(seed: jax.Array, sample: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), position)

    # one random stream a seed and sample, one key a position, whatever the row and the batch
    keys_B = jax.vmap(key)(seed_B, sample_B, position_B)
    return sampling.sample(
        logits_BV,
        keys_B,
        temperature=numbers.temperature,
        top_k=numbers.top_k if kind.top_k else None,
        top_p=numbers.top_p if kind.nucleus else None,
    )


def _no_tokens(config: ModelConfig, dtype: Any, rows: int, slots: int) -> list[KV]:
    return [KV.empty(rows, config.num_kv_heads, slots, config.head_dim, dtype) for _ in config.kinds]


def _split(caches: list[KV], mesh: Mesh | None) -> list[KV]:
    """Keeps caches split over the mesh by rows and heads."""
    return [KV(*(meshes.constrain(x, ("batch", "kv_heads", None, None), mesh) for x in kv)) for kv in caches]
