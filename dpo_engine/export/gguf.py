"""How does a merged folder become a GGUF file? By llama.cpp's own converter, where the user has it.

There is no package that holds it: it is a script in llama.cpp's repository, found in a folder that the user names, in the one
that LLAMA_CPP names, or on PATH. Where it is not found, the commands that fetch and run it are printed, and nothing is
converted.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from dpo_engine.errors import ConfigError, ExportError
from dpo_engine.export.folder import whole_file

SCRIPT = "convert_hf_to_gguf.py"
OUTTYPES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 1.0625, "tq1_0": 2.0, "tq2_0": 2.0, "auto": 2.0}
"""What the converter writes, and at most how many bytes a parameter takes then."""


def find_converter(given: str | None) -> Path | None:
    """llama.cpp's script: in the folder `given`, else that of $LLAMA_CPP, else on PATH; None if there is none.

    Raises:
        ConfigError: a folder was named that does not hold it.
    """
    named = {"--llama_cpp": given, "LLAMA_CPP": os.environ.get("LLAMA_CPP")}
    for source, folder in named.items():
        if folder:
            script = Path(folder).expanduser() / SCRIPT
            if not script.is_file():
                raise ConfigError(f"{source}={folder} holds no {SCRIPT}; expected a checkout of llama.cpp")
            return script.resolve()
    found = shutil.which(SCRIPT, mode=os.F_OK)
    return Path(found).resolve() if found else None


def convert(script: Path, model: Path, target: Path, outtype: str) -> None:
    """Run the converter on a model folder; `target` is whole or absent.

    Raises:
        ExportError: it failed, or wrote nothing.
    """
    with whole_file(target) as partial:
        command = [sys.executable, str(script), str(model), "--outfile", str(partial), "--outtype", outtype]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            said = " | ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-3:])
            raise ExportError(
                f"{SCRIPT} ended with {done.returncode}: {said}; no GGUF file was written, {model} is whole: mend what it says "
                f"(what it needs is in {script.parent / 'requirements'}) and run: "
                + shlex.join(convert_command(script, model, target, outtype))
            )
        if not partial.is_file() or not partial.stat().st_size:
            raise ExportError(
                f"{SCRIPT} ended well and wrote nothing to {partial}; no GGUF file was written, {model} is whole"
            )


def convert_command(script: Path, model: Path, target: Path, outtype: str) -> list[str]:
    """What a person types for the same."""
    return ["python", str(script), str(model), "--outfile", str(target), "--outtype", outtype]


def by_hand_lines(model: Path, target: Path, outtype: str) -> list[str]:
    """The commands that fetch llama.cpp's converter and run it."""
    folder = Path("llama.cpp")
    wide = target.with_name(target.name.replace(outtype, "f16"))
    small = target.with_name(target.name.replace(outtype, "Q4_K_M"))
    return [
        f"nothing was converted to GGUF: llama.cpp's {SCRIPT} was not found (--llama_cpp, LLAMA_CPP, PATH). By hand:",
        "  git clone --depth 1 https://github.com/ggml-org/llama.cpp",
        "  pip install -r llama.cpp/requirements/requirements-convert_hf_to_gguf.txt    # best into an environment of its own",
        "  " + shlex.join(convert_command(folder / SCRIPT, model, target, outtype)),
        "smaller than 8 bits, from a 16-bit file, once llama.cpp is built:",
        "  " + shlex.join(convert_command(folder / SCRIPT, model, wide, "f16")),
        "  " + shlex.join(["llama.cpp/build/bin/llama-quantize", str(wide), str(small), "Q4_K_M"]),
    ]
