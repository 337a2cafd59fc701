"""``python -m benchmarks.quality``."""

from benchmarks.quality.study import main

main()
