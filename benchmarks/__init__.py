"""Which benchmarks are there? `suites.py` has the table of them, `dpo-engine bench` runs it."""
