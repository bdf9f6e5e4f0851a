import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the trainer is flat files, not a package
sys.path.insert(0, str(Path(__file__).parent))

# The models here are so small that a second thread costs more than it does, above all where ranks
# share few cores: half of all CPU time went into waiting for it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
