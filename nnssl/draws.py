"""Random numbers that depend on what they are for, not on who draws them.

Every draw of a pretraining run comes from a generator seeded by (seed, stage, step, sample): the same whatever the number
of worker processes or of ranks, and the same after a restart. A sample is counted over the global batch.
"""

import hashlib
from collections.abc import Sequence

import torch


def draw_seed(*key: int | str) -> int:
    """Return a 63-bit seed for a key; equal keys give equal seeds on every machine."""
    digest = hashlib.blake2b("/".join(str(part) for part in key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def make_generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator seeded by a key, e.g. ``make_generator(seed, "reprec.contrastive", step, sample)``."""
    return torch.Generator().manual_seed(draw_seed(*key))


def sample_generators(seed: int, purpose: str, step: int, samples: Sequence[int]) -> list[torch.Generator]:
    """Return one generator for each sample of a step.

    Args:
        seed: the run's seed.
        purpose: what is drawn, e.g. ``"reprec.contrastive/views"``.
        step: training step, counted from 0 over the whole stage.
        samples: places of the samples in the global batch.
    """
    return [make_generator(seed, purpose, step, sample) for sample in samples]
