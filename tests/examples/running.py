"""Examples as a user runs them: as scripts, in a folder of their own."""

import os
import subprocess
import sys
from pathlib import Path

import sam_fused

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(script, *arguments, cwd, timeout=300):
    """The finished process. The script sees the package that these tests see, installed or not."""
    paths = [str(Path(sam_fused.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONIOENCODING": "utf-8",
        "COLUMNS": "100",
    }
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, encoding="utf-8", timeout=timeout)
