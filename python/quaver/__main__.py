"""`python -m quaver` is `quaver`."""

import sys

from quaver.cli import main

sys.exit(main())
