"""``python -m diffhook.run``, for accelerate launch and torchrun, is ``diffhook run``."""

import sys

from diffhook.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
