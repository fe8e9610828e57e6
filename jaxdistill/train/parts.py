"""In how many parts a step is taken, where the config leaves it open."""

from __future__ import annotations

from collections.abc import Mapping

from jaxdistill.config import TrainConfig

CPU_PART = 2**19
"""Numbers of the hidden state (rows x tokens x width) in one part on a CPU. What a part leaves for its backward pass
then stays near the caches, and comes from memory that the part before has used: pages that the system has to make anew
in every step cost more than adding up gradients. 15.7M parameters, 16 rows of 512 tokens, two cores, malloc as the
system has it: a step of 8.1 s in one part takes 6.1 s in eight, with a third of the memory."""


def micro_batches_of(
    train: TrainConfig,
    platform: str,
    sizes: Mapping[str, int],
    row_tokens: int,
    hidden_size: int,
    *,
    dropout: bool = False,
) -> int:
    """`train.micro_batches`; if absent, 1, or on CPUs the fewest equal parts of at most `CPU_PART` numbers a device.

    Accelerators want the largest part that their memory holds. A step that has other rows too, pairs or what the
    student has sampled, is not cut unasked, for these would have to divide as well.

    Args:
      platform: `cpu`, `tpu` or `gpu`.
      sizes: of the mesh's axes.
      dropout: of adapters; every part draws its own, so that other meshes would learn from other draws.
    """
    if train.micro_batches is not None:
        return train.micro_batches
    ways = sizes["data"] * sizes["fsdp"]
    other_rows = train.contrastive is not None or train.on_policy is not None
    if platform != "cpu" or dropout or other_rows or train.batch_rows % ways:
        return 1
    rows, row = train.batch_rows // ways, row_tokens // sizes["context"] * hidden_size
    return next((parts for parts in range(1, rows) if rows % parts == 0 and rows // parts * row <= CPU_PART), rows)
