# shellcheck shell=bash
# Sets up the Python environment; source it, then call copd_setup. Shared by all launchers.
#
#   . launchers/setup.sh && copd_setup [cpu|gpu|launch]
#
# Leaves an activated environment (PATH, VIRTUAL_ENV) that holds the pinned packages of requirements-<list>.txt
# and this project in editable mode. If that is already the case, it returns in well under a second. It can be
# run from any folder, and by several processes at the same time. Python may write bytecode in it.
#
#   COPD_VENV           the environment's folder; default .venv in the project (.venv-launch for launch)
#   COPD_REQUIREMENTS   cpu (default) or gpu, where the launcher names no list
#   COPD_PYTHON         the Python 3.12 to use, if it is not found automatically

COPD_ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)

_copd_say() { printf 'setup: %s\n' "$*" >&2; }

# Prints the manual of script $1: the comment at its top.
copd_manual() {
    sed -n -e 1d -e '/^#SBATCH/d' -e '/^#/!q' -e 's/^# \{0,1\}//p' -- "$1"
}

_copd_is_312() {
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1
}

# Prints the path of a Python 3.12, or says how to get one.
_copd_find_python() {
    local candidate
    if [ -n "${COPD_PYTHON:-}" ]; then
        if _copd_is_312 "$COPD_PYTHON"; then
            printf '%s\n' "$COPD_PYTHON"
            return 0
        fi
        _copd_say "COPD_PYTHON=$COPD_PYTHON is not a working Python 3.12"
        return 1
    fi
    for candidate in python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12 python3 python \
        /usr/bin/python3.12 /usr/local/bin/python3.12; do
        if _copd_is_312 "$candidate"; then
            command -v -- "$candidate"
            return 0
        fi
    done
    if candidate=$(uv python find 3.12 2>/dev/null) && _copd_is_312 "$candidate"; then
        printf '%s\n' "$candidate"
        return 0
    fi
    cat >&2 <<'EOF'
setup: Python 3.12 is needed and was not found. Any one of these provides it:
  Ubuntu 24.04:  sudo apt-get install python3.12 python3.12-venv
  pyenv:         pyenv install 3.12
  uv:            uv python install 3.12
Then run this again, or set COPD_PYTHON to its path.
EOF
    return 1
}

# Creates environment $1 with Python $2 and prints the uv to use for it: the one on PATH, or one installed into
# the environment (never into the system's Python, which may be externally managed).
_copd_make_venv() {
    local venv=$1 python=$2
    if uv --version >/dev/null 2>&1; then
        [ -x "$venv/bin/python" ] || uv venv --quiet --python "$python" "$venv" >&2 || return 1
        command -v uv
        return 0
    fi
    if [ ! -x "$venv/bin/uv" ]; then
        if ! "$python" -m venv "$venv" >&2; then
            _copd_say "$python cannot create environments; on Debian and Ubuntu: sudo apt-get install python3.12-venv"
            return 1
        fi
        _copd_say "installing uv"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check 'uv>=0.5' >&2 || return 1
    fi
    printf '%s\n' "$venv/bin/uv"
}

# Installs list $2 into environment $1 with uv $3.
_copd_install() {
    local venv=$1 list=$2 uv=$3 requirements="$COPD_ROOT/requirements-$2.txt"
    local target=("$uv" pip install --python "$venv/bin/python" --no-deps)
    if [ "$list" = gpu ]; then
        # Transformer Engine's torch extension is compiled here, against the torch that the first pass installs.
        "${target[@]}" -r <(grep -v '^transformer-engine-torch==' "$requirements") || return 1
        if ! command -v nvcc >/dev/null 2>&1 && [ ! -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then
            _copd_say "nvcc not found: building Transformer Engine needs the CUDA 13 toolkit; set CUDA_HOME"
            return 1
        fi
        # Few parallel jobs, so that the compiler does not exhaust the memory.
        MAX_JOBS=${MAX_JOBS:-4} NVTE_FRAMEWORK=pytorch "${target[@]}" --no-build-isolation -r \
            <(grep '^transformer-engine-torch==' "$requirements") || return 1
    else
        "${target[@]}" -r "$requirements" || return 1
    fi
    # The launch environment reads configurations straight from the source tree.
    if [ "$list" = launch ]; then
        printf '%s\n' "$COPD_ROOT" >"$("$venv/bin/python" -c \
            'import sysconfig; print(sysconfig.get_path("purelib"))')/copd_megatron.pth" || return 1
    else
        "${target[@]}" --no-build-isolation --editable "$COPD_ROOT" || return 1
    fi
}

# What the environment was set up from. If this changes, it is set up again.
_copd_state() {
    local venv=$1 list=$2
    printf '%s\n' "$list" "$COPD_ROOT" "$venv"
    sha256sum <"$COPD_ROOT/requirements-$list.txt"
    sha256sum <"$COPD_ROOT/pyproject.toml"
    grep -E '^version(_info)? *=' "$venv/pyvenv.cfg" 2>/dev/null
}

_copd_is_ready() {
    [ -x "$1/bin/python" ] && [ -f "$1/.copd-setup" ] && [ "$(<"$1/.copd-setup")" = "$(_copd_state "$1" "$2")" ]
}

_copd_setup_locked() {
    local venv=$1 list=$2 python uv free_kib
    if _copd_is_ready "$venv" "$list"; then return 0; fi
    rm -f "$venv/.copd-setup"
    if [ -n "$(ls -A -- "$venv" 2>/dev/null)" ] && ! _copd_is_312 "$venv/bin/python"; then
        if [ "$venv" != "$COPD_ROOT/.venv" ] && [ "$venv" != "$COPD_ROOT/.venv-launch" ]; then
            _copd_say "COPD_VENV=$venv exists and is not a Python 3.12 environment; remove it or name another"
            return 1
        fi
        _copd_say "$venv is not a working Python 3.12 environment: creating it again"
        rm -rf -- "$venv"
    fi
    python=$(_copd_find_python) || return 1
    mkdir -p -- "$(dirname -- "$venv")" || return 1
    free_kib=$(df -Pk -- "$(dirname -- "$venv")" | awk 'NR == 2 { print $4 }')
    if [ "$list" != launch ] && [ ! -e "$venv" ] && [ "${free_kib:-99999999}" -lt 12000000 ]; then
        _copd_say "only $((free_kib / 1000000)) GB are free at $venv and the packages take about 8 GB;" \
            "to put them elsewhere, set COPD_VENV"
    fi
    if [ "$list" != launch ] && ! command -v cc >/dev/null 2>&1 && ! command -v gcc >/dev/null 2>&1; then
        _copd_say "some packages are compiled here, which needs a C compiler; on Debian and Ubuntu:" \
            "sudo apt-get install gcc python3.12-dev"
        return 1
    fi
    _copd_say "installing requirements-$list.txt into $venv (Python: $python)"
    uv=$(_copd_make_venv "$venv" "$python") || return 1
    _copd_install "$venv" "$list" "$uv" || return 1
    _copd_state "$venv" "$list" >"$venv/.copd-setup"
    if [ "$list" != launch ] && ! command -v bwrap >/dev/null 2>&1; then
        _copd_say "the verifiers 'code' and 'proof' need bubblewrap, which is not here; on Debian and Ubuntu:" \
            "sudo apt-get install bubblewrap"
    fi
    _copd_say "done"
}

# copd_setup [cpu|gpu|launch]: sets up if needed and activates. On failure prints why and returns non-zero.
copd_setup() {
    local list=${1:-${COPD_REQUIREMENTS:-cpu}} venv
    if [ ! -f "$COPD_ROOT/requirements-$list.txt" ]; then
        _copd_say "there is no list '$list'; use cpu, gpu or launch"
        return 1
    fi
    venv=$COPD_ROOT/.venv
    if [ "$list" = launch ]; then venv=$COPD_ROOT/.venv-launch; fi
    venv=${COPD_VENV:-$venv}
    case $venv in
        /*) ;;
        *) venv=$PWD/$venv ;;
    esac
    if ! _copd_is_ready "$venv" "$list"; then
        # The project folder itself serves as the lock, so that no lock file is left behind. The subshell's
        # children need not close it: all of them end before the subshell does.
        (
            flock 9 || exit 1
            _copd_setup_locked "$venv" "$list"
        ) 9<"$COPD_ROOT" || return 1
    fi
    export VIRTUAL_ENV=$venv
    export PATH=$venv/bin:$PATH
    # Container images often set the second one. Every process would then compile every package again: a rank
    # needs 23 seconds of CPU for its imports instead of 10.
    unset PYTHONHOME PYTHONDONTWRITEBYTECODE
}
