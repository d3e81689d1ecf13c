"""What is installed: the packages, their dependencies and the command `dpo-engine`.

The Triton kernels live in the top-level folder `kernels/` and are installed as `dpo_engine.kernels`. A wheel therefore
holds the kernel files where a checkout holds `dpo_engine/kernels/__init__.py`, which only points at that folder.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# Read, not imported: importing the package must not be needed to build it.
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "dpo_engine" / "__init__.py").read_text("utf-8"), re.M)[1]
README = ROOT / "README.md"

EXTRAS = {
    # What `dpo-engine train` and `DPOTrainer` need. transformers before 5.10.4 crashes beside a folder named `kernels`.
    "train": [
        "accelerate>=1.10",
        # Quantised heads, and models in 4 bits. It has a CPU backend.
        'bitsandbytes>=0.49; platform_system == "Linux" or platform_system == "Windows"',
        "datasets>=4.0",
        "peft>=0.18",
        "psutil>=6.0",
        "pyyaml>=6.0",
        "rich>=13.0",
        "safetensors>=0.6",
        "transformers>=5.10.4",
        "typer>=0.16",
    ],
    # Reads the packaged demo model, and draws the picture at the end.
    "demo": ["gguf>=0.17", "matplotlib>=3.9"],
    "report": ["matplotlib>=3.9"],
    "bench": ["matplotlib>=3.9", "psutil>=6.0"],
    # Norms, rope and activations of the backbone in one kernel each, on a card.
    "liger": ['liger-kernel>=0.6; platform_system == "Linux"'],
    # TRL 1.16 needs Python 3.11: on 3.10 this extra is empty.
    "trl": ['trl==1.16.*; python_version >= "3.11"'],
    "dev": [
        "build>=1.2",
        "hypothesis>=6.100",
        # For examples/lightning_module.py.
        "lightning>=2.5",
        "mypy>=1.15",
        "pre-commit>=4.0",
        "pytest>=8.3",
        # For benchmarks/regression.
        "pytest-benchmark>=5.1",
        "pytest-xdist>=3.7",
        "ruff>=0.11",
        "setuptools>=77",
        "types-PyYAML>=6.0",
    ],
}

setup(
    name="dpo-engine",
    version=VERSION,
    description="Preference optimisation on one GPU: no logits, no padding, every prompt once",
    long_description=README.read_text("utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=sorted({*find_packages(include=["dpo_engine", "dpo_engine.*"]), "dpo_engine.kernels"}),
    package_dir={"dpo_engine.kernels": "kernels"},
    package_data={"dpo_engine": ["py.typed"], "dpo_engine.memory": ["configs/*.json"]},
    include_package_data=False,
    install_requires=[
        "torch>=2.9",
        # A CPU-only build of torch does not bring Triton along; the GPU builds pin their own.
        'triton>=3.5; platform_system == "Linux" and (platform_machine == "x86_64" or platform_machine == "aarch64")',
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["dpo-engine = dpo_engine.cli.main:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
