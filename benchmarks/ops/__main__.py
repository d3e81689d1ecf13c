"""python -m benchmarks.ops"""

import sys

from benchmarks.ops.run import main

sys.exit(main())
