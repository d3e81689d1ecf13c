"""python -m benchmarks.report"""

import sys

from benchmarks.report.run import main

sys.exit(main())
