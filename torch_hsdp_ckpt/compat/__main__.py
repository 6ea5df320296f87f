"""``python -m torch_hsdp_ckpt.compat script.py ...`` runs a script with this package in torch's
place; with ``TORCH_HSDP_CKPT=0`` as it is."""

import os
import runpy
import sys

from torch_hsdp_ckpt.compat import patch


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python -m torch_hsdp_ckpt.compat script.py [arguments]")
    if os.environ.get("TORCH_HSDP_CKPT", "1") != "0":
        patch()
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
