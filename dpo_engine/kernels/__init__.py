"""Where the Triton kernels are found: the files live in the top-level folder `kernels/`.

That folder has no `__init__.py`, because transformers imports an unrelated package of the same name. In a wheel this file is
left out and `dpo_engine/kernels/` holds the kernel files themselves.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "kernels")]
