"""``python -m torch_hsdp_ckpt.compat script.py ...``, or ``-m module ...``, runs a program with
this package in torch's place; with ``TORCH_HSDP_CKPT=0`` as it is."""

import sys

from torch_hsdp_ckpt.compat.script import run


def main() -> None:
    arguments = sys.argv[1:]
    if len(arguments) < 1 + (arguments[:1] == ["-m"]):
        sys.exit("usage: python -m torch_hsdp_ckpt.compat (script.py | -m module) [arguments]")
    run(arguments)


if __name__ == "__main__":
    main()
