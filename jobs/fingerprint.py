"""The fingerprint of a piece of work: where it is equal, the inputs are the same and there is nothing to do."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def fingerprint(inputs: Any) -> str:
    """32 hexadecimal digits of `inputs`, which JSON can hold; the order of keys in mappings does not matter."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]
