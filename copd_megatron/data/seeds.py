"""Seeds derived from what they are for, so that nothing depends on the order of events."""

from __future__ import annotations

import hashlib


def sample_seed(run_seed: int, branch: str, step: int, group_id: str, sample_index: int) -> int:
    """The seed of one sampled response: a function of what it is, not of where or when it is sampled.

    ``group_id``: see ``Prompt.group_id``; for seeds of other things, any name.
    """
    text = f"{run_seed}/{branch}/{step}/{group_id}/{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")
