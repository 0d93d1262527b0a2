"""``python -m tracedensity`` is ``tracedensity``."""

import sys

from tracedensity.cli import main

if __name__ == "__main__":
    sys.exit(main())
