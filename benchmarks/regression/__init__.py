"""Has a call of the operator become slower since another commit? Tests for pytest-benchmark."""
