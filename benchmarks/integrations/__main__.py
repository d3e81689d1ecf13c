"""python -m benchmarks.integrations"""

import sys

from benchmarks.integrations.run import main

sys.exit(main())
