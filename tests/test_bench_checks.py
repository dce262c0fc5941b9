"""``tools/bench_checks.py`` has a clock around every check that it names, where the checks are called."""

from __future__ import annotations

from tests.support.commands import load_tool, python

SCRIPT = """
import runpy, sys
sys.path.insert(0, "tools")
tool = runpy.run_path("tools/bench_checks.py")
clocks = tool["Clocks"]()
tool["install"](clocks)
import numpy as np
from copd_megatron.data import samples
from copd_megatron.data.samples import SampleRef
from copd_megatron.opd import router, wire
samples.parse_sample(b'{"prompt": "x", "answer": "y", "verifier": "z"}', SampleRef("s", "k"), "here")
router.ids_crc([])
try:
    wire.Header.unpack(np.zeros(wire.HEADER_FIELDS, np.int64), "here")
except wire.RouterError:
    pass
for kind, calls in clocks.calls.items():
    print(kind, calls, clocks.seconds[kind] > 0, sep="\\t")
"""


def test_every_check_that_is_named_has_a_clock() -> None:
    done = python("-c", SCRIPT)
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    found = {kind: (int(calls), timed == "True") for kind, calls, timed in rows}
    assert set(found) == set(load_tool("bench_checks")["CHECKS"])
    assert found["samples of shards"] == (2, True)
    assert found["JSON reader"] == (1, False), "its time is the outer check's"
    assert found["wire: CRC"][0] == 3 and found["wire: counts and ranges"] == (1, True)
    assert found["media sizes"] == (0, False)


def test_shares_of_a_step() -> None:
    tool = load_tool("bench_checks")
    kinds = list(tool["CHECKS"])
    seconds = dict.fromkeys(kinds, 0.0) | {kinds[0]: 0.01, kinds[1]: 0.03}
    step = {"cpu": 2.0, "wall": 4.0, "seconds": seconds, "calls": dict.fromkeys(kinds, 1)}
    found = tool["shares"]([step, step | {"cpu": 4.0}])
    assert found[kinds[0]] == [0.5, 0.25] and found["all checks"] == [2.0, 1.0]
    text = tool["table"]([step, step | {"cpu": 4.0}], found)
    assert "2 steps of all ranks" in text and "1.5000     1.0000     2.0000" in text
