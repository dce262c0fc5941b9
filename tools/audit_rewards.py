#!/usr/bin/env python3
"""Grades recorded responses again, and lists verdicts that differ from what was recorded or a person said.

    python tools/audit_rewards.py runs/three_branch_tiny --branch text
    python tools/audit_rewards.py labelled.jsonl --verifier math --json

A JSONL file has an object a line: response, answer (or expected), verifier, and where they are known
prompt, metadata, and label (true, false or a number) or reward. Responses of which a run kept only a part are
left out, and so is what lies beyond --limit; the output counts and names them. Training samples of a
branch with reward.terms are graded by all terms, as the run did.
Ends with status 1 where a verdict disagrees.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import _tree  # noqa: F401  (puts this tree on the path)
from _numbers import amount, count

from copd_megatron.errors import ConfigError, DataError
from copd_megatron.rewards import UnknownVerifierError
from copd_megatron.rewards.audit import audit
from copd_megatron.samples.audit import as_json, as_lines, read_cases
from copd_megatron.samples.files import Selection


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path, help="a run directory, or a JSONL file")
    parser.add_argument("--verifier", help="grades all responses, whatever they name")
    parser.add_argument(
        "--allow-verifier", action="append", default=[], metavar="MODULE:FUNCTION",
        help="one of your own that the source may name; repeatable",
    )  # fmt: skip
    parser.add_argument("--branch", help="of a run: the branch that sampled")
    parser.add_argument("--limit", type=count, help="grade so many at most")
    parser.add_argument("--timeout", type=amount, default=10.0, metavar="SECONDS", help="for each response")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    try:
        selection = Selection(branch=arguments.branch)
        found = read_cases(arguments.source, verifier=arguments.verifier, selection=selection)
        taken = found.first(arguments.limit)
        trusted = [*arguments.allow_verifier, *filter(None, [arguments.verifier])]
        result = audit(taken.cases, timeout_seconds=arguments.timeout, trusted=trusted)
    except (ConfigError, DataError, OSError, UnknownVerifierError, ValueError) as error:
        parser.error(str(error))
    if arguments.json:
        print(json.dumps(as_json(result, taken.left_out), indent=2, ensure_ascii=True))
    else:
        print("\n".join(as_lines(result, taken.left_out)).encode("utf-8", "backslashreplace").decode("utf-8"))
    return 1 if result.disagreements else 0


if __name__ == "__main__":
    raise SystemExit(main())
