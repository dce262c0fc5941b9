"""Collecting the tests imports no engine: choosing one test out of all takes seconds, not a minute."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.support.commands import ROOT

ENGINES = ("vllm", "megatron", "transformer_engine", "transformers")

COLLECT = """
import json, sys
import pytest
status = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "tests"])
imported = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps({"status": int(status), "imported": imported}))
"""


def test_collecting_all_tests_imports_no_engine() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COLLECT], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    *listed, last = done.stdout.splitlines()
    found = json.loads(last)
    assert found["status"] == 0, done.stdout[-4000:]
    assert len(listed) > 1000, "all tests were collected"
    assert not set(ENGINES) & set(found["imported"]), "import them in the function or fixture that needs them"
