"""What holds and what it costs on a GPU or TPU: `python -m tests.accelerator`."""

import sys
from pathlib import Path

# Modules of tests import each other by name, as pytest lets them.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
