"""python -m benchmarks: the same as `dpo-engine bench`."""

import sys

from benchmarks.bench import main

sys.exit(main())
