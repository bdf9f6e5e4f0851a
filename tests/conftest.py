"""What all tests share; and the whole suite's second lane, since most tests keep one core busy."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS.parent))  # the trainer is flat files, not a package
sys.path.insert(0, str(TESTS))

# What the tests find is what a CPU gives, for as many ranks as they like, whatever GPUs there are.
# The few that compare ranks run on GPUs and NCCL, too: TEST_ON_GPUS=1, with test_golden.py and
# `-k meshes` of test_train.py; four GPUs are enough for all.
if os.environ.get("TEST_ON_GPUS") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# The models here are so small that a second thread costs more than it does, above all where ranks
# share few cores: half of all CPU time went into waiting for it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Files that a second pytest runs meanwhile when all are asked for: almost half of the time. None
# of them measures time (but a processor's), or waits for a timeout.
SECOND_LANE = ["test_models.py", "test_forks.py", "test_smoke.py", "test_seen.py",
               "test_rehearsal.py", "test_golden.py", "test_convert.py", "test_tokenizer.py",
               "test_configs.py", "test_model.py"]
lane = None  # (process, file of its output)


def pytest_collection_modifyitems(config, items):
    global lane
    files = {item.path for item in items}
    some = config.option.collectonly or config.option.keyword or config.option.markexpr
    if some or not {TESTS / name for name in SECOND_LANE} < files:
        return
    output = tempfile.TemporaryFile("w+")
    command = [sys.executable, "-m", "pytest", *config.invocation_params.args]
    command = [word for word in command if not Path(word).exists() or word == sys.executable]
    command += [str(TESTS / name) for name in SECOND_LANE]
    lane = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT), output
    items[:] = [item for item in items if item.path.name not in SECOND_LANE]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """The session fails if the lane has."""
    if lane and lane[0].wait():
        session.exitstatus = session.exitstatus or 1


def pytest_terminal_summary(terminalreporter):
    if lane:
        lane[1].seek(0)
        terminalreporter.section("second lane")
        terminalreporter.write(lane[1].read())


def pytest_unconfigure():
    if lane and lane[0].poll() is None:  # the session was broken off
        lane[0].terminate()
