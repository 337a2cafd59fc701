"""``python -m diagd.cli``."""

import sys

from diagd.cli.main import main

sys.exit(main())
