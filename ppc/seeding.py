"""Seeds that depend on what they are for and on nothing else: not on call order, process or Python's hash()."""

from __future__ import annotations

import hashlib
import json
import operator
import random
from typing import SupportsIndex


def derive_seed(*parts: SupportsIndex | str) -> int:
    """A seed in [0, 2**63) from integers and strings; the same on every machine and in every process."""
    plain = [part if isinstance(part, str) else operator.index(part) for part in parts]
    digest = hashlib.sha256(json.dumps(plain).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def derive_rng(*parts: SupportsIndex | str) -> random.Random:
    """Python's generator seeded with `derive_seed(*parts)`."""
    return random.Random(derive_seed(*parts))
