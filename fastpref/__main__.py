"""`python -m fastpref`: the same as `fastpref`."""

import sys

from .cli import main

sys.exit(main())
