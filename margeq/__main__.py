"""``python -m margeq``."""

import sys

from margeq.cli import main

sys.exit(main())
