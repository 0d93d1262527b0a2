"""``python -m tracedensity.cli``."""

import sys

from tracedensity.cli import main

if __name__ == "__main__":
    sys.exit(main())
