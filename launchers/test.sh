#!/usr/bin/env bash
# Sets up, then runs the linter, the type checker and the tests. Arguments go to pytest.
#
#   launchers/test.sh                          all but the slow tests, about 12 minutes on two cores
#   launchers/test.sh tests/test_config.py     some
#   launchers/test.sh -m slow                  only the slow ones
#   launchers/test.sh -n 0 -x --pdb            one after the other, in one process, as a debugger needs it
#
# Two files of tests run side by side. Each may have up to four ranks at work and take some GB of memory, so more than
# two at once (-n 4) need a larger machine.
#
# Tests that need a GPU skip themselves, with the reason, where there is none.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck source-path=SCRIPTDIR source=setup.sh
. "$here/setup.sh"
if [[ ${1-} == -h || ${1-} == --help ]]; then
    copd_manual "${BASH_SOURCE[0]}"
    exit 0
fi
cd -- "$COPD_ROOT"
copd_setup

export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 TOKENIZERS_PARALLELISM=false
# Several ranks share the cores in most tests.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

failed=()
ruff check . || failed+=("ruff")
mypy || failed+=("mypy")
if [ ${#failed[@]} -gt 0 ]; then
    echo "test.sh: ${failed[*]} failed (see above); the tests run anyway" >&2
fi
# What tests of a file share (models, a base, a SLURM) is made once, since a file stays in one process.
python -m pytest -n 2 --dist loadfile -m "not slow" "$@" || failed+=("pytest")
[ ${#failed[@]} -eq 0 ]
