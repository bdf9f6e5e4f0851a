import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the trainer is flat files, not an installed package
sys.path.insert(0, str(Path(__file__).parent))
