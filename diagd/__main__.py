"""``python -m diagd``."""

import sys

from diagd.cli.main import main

sys.exit(main())
