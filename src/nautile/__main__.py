"""``python -m nautile`` is the command ``nautile``."""

import sys

from nautile.cli.main import main

sys.exit(main())
