"""The frameworks that are known to work with ``patch()``, from which version on."""

import importlib.metadata
import re
import sys

# The first releases with what the tests use of them: FSDP2, or the sharded checkpoints.
OLDEST = {
    "accelerate": (1, 6),
    "lightning": (2, 4),
    "peft": (0, 15),
    "torchtitan": (0, 2),
    "transformers": (4, 51),
}


def check_frameworks() -> None:
    """ValueError if one of them is imported and too old."""
    for name, oldest in OLDEST.items():
        if name not in sys.modules:
            continue
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # another module of this name
        numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
        if numbers < oldest:
            raise ValueError(
                f"{name} {version} is too old for torch_hsdp_ckpt.compat: "
                f"{'.'.join(map(str, oldest))} or newer is needed"
            )
