"""``python -m ming_rt`` is ``ming-rt``."""

import sys

from ming_rt.cli import main

sys.exit(main())
