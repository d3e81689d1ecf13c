"""Which faults must the tests see? All of them, by name."""

from __future__ import annotations

from mutation.call_mutants import CALL_MUTANTS
from mutation.torch_mutants import TORCH_MUTANTS
from mutation.triton_mutants import TRITON_MUTANTS

MUTANTS = (*TORCH_MUTANTS, *CALL_MUTANTS, *TRITON_MUTANTS)
