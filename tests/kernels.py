"""A Jupyter kernel that is this interpreter, whatever kernels the machine has."""

import json
import sys
from pathlib import Path

__all__ = ["own_kernel"]


def own_kernel(folder: Path) -> dict[str, str]:
    """Write a kernel named `own`; returns the environment variables under which it is found, and nothing of the user's is."""
    place = folder / "kernels" / "own"
    place.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (place / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "own", "language": "python"}))
    names = ("JUPYTER_PATH", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    return dict.fromkeys(names, str(folder))
