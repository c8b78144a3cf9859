"""``python -m diffhook`` is the ``diffhook`` command."""

import sys

from diffhook.cli import main

sys.exit(main())
