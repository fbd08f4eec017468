"""luffy.py without curves.png and report.html, which take longer than a run of a few steps."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # torchrun starts it as a script

import luffy  # noqa: E402
from machinery import run_directory, scores  # noqa: E402
from machinery.processes import launch  # noqa: E402

if __name__ == "__main__":
    run_directory.draw = scores.draw = lambda directory: None
    launch(luffy.main)
