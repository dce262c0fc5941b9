#!/usr/bin/env bash
# Writes the pinned lists requirements-{cpu,gpu,launch}.txt from pyproject.toml.
#
#   tools/compile_requirements.sh              keeps present pins where they still fit
#   tools/compile_requirements.sh --upgrade    takes the newest versions that fit
#
# Plain name==version lines only: no hashes, no registry addresses.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

uv=(uv)
if [ -x .venv/bin/uv ]; then uv=(.venv/bin/uv); fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

header() {
    cat <<EOF
# $1
# Exact versions, complete: install with --no-deps (launchers/setup.sh does).
# Written by tools/compile_requirements.sh; change pyproject.toml and run it again, do not edit here.
EOF
}

# compile_list NAME TITLE UV-ARGUMENT...
compile_list() {
    local name=$1 title=$2 list="$scratch/$1.txt"
    shift 2
    if [ -f "requirements-$name.txt" ]; then
        grep -v '^#' "requirements-$name.txt" >"$list" || true
    fi
    "${uv[@]}" pip compile --quiet --python-version 3.12 --no-header --no-annotate \
        --output-file "$list" "$@" >/dev/null
    { header "$title"; cat "$list"; } >"requirements-$name.txt"
}

compile_list cpu "Everything for machines without a GPU, tests and checks included." \
    pyproject.toml --extra cpu --extra dev "$@"
compile_list gpu "Everything for machines with NVIDIA GPUs (CUDA 13), tests and checks included." \
    pyproject.toml --extra gpu --extra dev "$@"
# The launching environment has none of the package's own dependencies but what reads settings and data.
python3 - >"$scratch/launch.in" <<'EOF'
import re
text = open("pyproject.toml", encoding="utf-8").read()
print("\n".join(re.findall(r'"([^"]+)"', re.search(r"^launch = \[(.*?)\]", text, re.M | re.S)[1])))
EOF
compile_list launch "NeMo-Run for a login node: an environment of its own (COPD_VENV=.venv-launch)." \
    "$scratch/launch.in" "$@"
