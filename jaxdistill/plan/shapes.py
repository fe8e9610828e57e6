"""What follows from shapes alone: bytes a device, and the FLOPs that a program should need."""

from __future__ import annotations

import math
from typing import Any

import jax

from jaxdistill.losses import Layout
from jaxdistill.losses.sweep import default_chunk
from jaxdistill.models import Lora, ModelConfig
from jaxdistill.models.attention import choose, platform_of
from jaxdistill.models.attention.blocks import BLOCK
from jaxdistill.models.attention.dense import QUERY_BLOCKS
from jaxdistill.train.program import Program

KERNEL_TILE = 128
"""Tokens of a tile of scores in GPUs' attention kernels."""


def device_bytes(tree: Any) -> float:
    """Bytes of one device, of abstract arrays with shardings."""
    leaves = jax.tree.leaves(tree)
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves))


class Sizes:
    """The sizes of a program on one device, by what they are needed for."""

    def __init__(self, made: Program, micro_batches: int, trained_share: float, segment_tokens: int | None):
        self.made, self.config, self.micro_batches = made, made.student, micro_batches
        shape, (rows, self.row_tokens) = made.mesh.shape, made.shape
        self.tensor, self.context = shape["tensor"], shape["context"]
        self.rows = rows // micro_batches // (shape["data"] * shape["fsdp"])
        """Of a micro-batch."""
        self.tokens = self.rows * self.row_tokens // self.context
        self.trained = trained_share * self.tokens
        self.segment = min(segment_tokens or self.row_tokens, self.row_tokens)
        layout = Layout.of(made.mesh)
        self.columns = -(-self.config.vocab_size // self.tensor)
        self.chunk = min(default_chunk(self.columns, layout), max(self.tokens, 1))
        self.kernel = self._kernel()
        """Attention's, of `models.attention.KERNELS`."""

    def _kernel(self) -> str:
        mesh, asked = self.made.mesh, self.made.model.attention
        if asked.kernel != "auto":
            return asked.kernel
        return choose(
            platform_of(mesh), self.row_tokens // (1 if self.heads_split else self.context), self.config.head_dim,
            self.made.model.dtype, max_segments=asked.max_segments, deterministic=asked.deterministic,
            device=mesh.devices.flat[0],
        )  # fmt: skip

    @property
    def heads_split(self) -> bool:
        """Whether tokens that are split over `context` are exchanged for heads."""
        return self.config.num_heads // self.tensor % self.context == 0

    @property
    def chunks(self) -> int:
        """Runs of the loop over the vocabulary's chunks, for one micro-batch."""
        return max(1, math.ceil(self.trained / self.chunk))

    @property
    def key_blocks(self) -> float:
        """Key blocks that a query block meets on average (`blocks` alone)."""
        row, own = math.ceil(self.row_tokens / BLOCK), math.ceil(self.segment / BLOCK)
        if own >= row:
            return (row + 1) / 2
        # segments begin anywhere: a block of queries has about one more block before it
        return min((row + 1) / 2, (own + 1) / 2 + 1)

    @property
    def kernel_share(self) -> float:
        """Of the work of attention's kernels for whole rows, what they do for the segments that the rows hold.

        GPUs' kernels pass over tiles of other segments; TPUs' are set up for the row's causal mask alone.
        """
        if platform_of(self.made.mesh) != "gpu":
            return 1.0
        return (self.segment + KERNEL_TILE) / (self.row_tokens + KERNEL_TILE)

    def loop_length(self, scope: str) -> float | None:
        """How often a loop runs whose end depends on the data."""
        from jaxdistill.losses.sweep import CHUNKS
        from jaxdistill.models.attention.blocks import KEY_BLOCKS

        if scope.rstrip("/").endswith(f"{CHUNKS}/while"):
            return self.chunks
        return self.key_blocks if scope.rstrip("/").endswith(f"{KEY_BLOCKS}/while") else None

    def vocabulary_bytes(self) -> float:
        """Logits and slopes of a chunk, and the projection with its gradient at full width."""
        width = self.config.hidden_size
        itemsize = self.made.model.dtype.itemsize
        return self.columns * (2.0 * 4 * self.chunk + width * (4 + itemsize))

    def matrix_flops(self) -> float:
        """Of one device and step, without attention's scores."""
        lora, remat = self.made.lora, self.made.model.remat
        layer = self._layer_weights(self.config)
        weights = sum(layer.values())
        # gradients by inputs and by weights; adapters train their own weights alone
        products = 2 * weights if lora is None else weights
        if remat not in ("none", "dots"):
            # nothing needs the last matrix's output again
            products += weights - layer["down"]
        products += weights
        adapters = self._adapter_weights(lora)
        total = 2.0 * self.tokens * self.config.num_layers * (products + 4 * adapters) / self.tensor
        # logits, and gradients by hidden states and by the projection, which adapters leave frozen
        head = 2.0 * (3 if lora is None else 2) * self.config.hidden_size * self.columns * self.chunks * self.chunk
        return self.micro_batches * (total + head + self._rotary_flops() + self._teacher_flops())

    def _rotary_flops(self) -> float:
        """TPUs exchange the halves of queries and keys by a product (`models.rotary`)."""
        c, model = self.config, self.made.model
        if platform_of(self.made.mesh) != "tpu" or model.activations.itemsize > 2:
            return 0.0
        # forward, backward, and forward again where products are not kept
        times = 2 if model.remat in ("none", "dots") else 3
        layers = sum(kind.rope is not None for kind in c.kinds)
        heads = (c.num_heads + c.num_kv_heads) / self.tensor
        return 2.0 * times * layers * self.tokens * heads * c.head_dim**2

    def _teacher_flops(self) -> float:
        """One pass forward, and the projection of what is trained."""
        d = self.made.distillation
        if d is None or d.teacher is None:
            return 0.0
        c = d.teacher.config
        layers = c.num_layers * sum(self._layer_weights(c).values()) * self.tokens / self.tensor
        return 2.0 * (layers + c.hidden_size * self.columns * self.chunks * self.chunk)

    def attention_flops(self) -> float:
        """Scores and weighted values of one device and step, where they are written in JAX; 0 for kernels."""
        if self.kernel not in ("dense", "blocks"):
            return 0.0
        c, T = self.config, self.row_tokens
        if self.kernel == "dense":
            parts = QUERY_BLOCKS if T % QUERY_BLOCKS == 0 and T >= 64 else 1
            pairs, backward = T * T * (parts + 1) / (2 * parts), 4
        else:
            block = min(BLOCK, T)
            pairs, backward = math.ceil(T / block) * block * block * self.key_blocks, 5
        # what is saved of attention is enough for `blocks`; `dense` computes its weights again
        saved = 1 if self.kernel == "dense" else 0
        again = {"none": 0, "full": 2}.get(self.made.model.remat, saved)
        heads = c.num_heads / self.tensor / self.context
        one = 2.0 * self.rows * heads * c.head_dim * pairs
        return self.micro_batches * c.num_layers * one * (2 + again + backward)

    def pairs(self) -> float:
        """Pairs of query and key of the global batch, over all layers, that the model has to look at."""
        rows, T = self.made.shape
        total = 0.0
        for kind in self.config.kinds:
            near = min(kind.window or self.segment, self.segment)
            total += rows * T * ((near + 1) / 2 if near == self.segment else near - near * near / (2 * self.segment))
        return total

    @staticmethod
    def _layer_weights(c: ModelConfig) -> dict[str, int]:
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        sizes = {"q": q, "k": kv, "v": kv, "o": q}
        mlp = dict.fromkeys(("gate", "up", "down"), c.intermediate_size)
        return {name: c.hidden_size * size for name, size in (sizes | mlp).items()}

    def _adapter_weights(self, lora: Lora | None) -> int:
        if lora is None:
            return 0
        return sum(lora.rank * (self._sides(name)[0] + self._sides(name)[1]) for name in lora.targets)

    def _sides(self, name: str) -> tuple[int, int]:
        c = self.config
        return c.hidden_size, self._layer_weights(c)[name] // c.hidden_size
