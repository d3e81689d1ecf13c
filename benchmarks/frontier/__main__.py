"""python -m benchmarks.frontier"""

import sys

from benchmarks.frontier.run import main

sys.exit(main())
