import sys
from pathlib import Path

# The scripts import each other as they do when one of them is run.
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
