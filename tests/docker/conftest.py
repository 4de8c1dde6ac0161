"""The checks live beside the files they check, outside of the package, and are found by their folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "docker"))
