"""python -m benchmarks.steps"""

import sys

from benchmarks.steps.run import main

sys.exit(main())
