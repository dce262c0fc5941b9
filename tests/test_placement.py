"""Ranks on nodes, and what srun says of a task: arithmetic, and the launcher's check as a command."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.config.graph import Edge
from copd_megatron.launch.placement import PlacementError, host_list, place
from copd_megatron.launch.switches import arrange
from copd_megatron.topology.layout import BranchLayout, Layout
from copd_megatron.topology.slurm import first_host, hosts_of, step_environment, switches
from tests.support.domains import make_domains
from tests.support.models import make_model

Sizes = list[tuple[int, int, int]]
"""(tensor parallel, rollout tensor parallel, data parallel) of each branch"""


def layout(sizes: Sizes) -> Layout:
    branches, first = {}, 0
    for number, (tp, rollout_tp, dp) in enumerate(sizes):
        branches[f"b{number}"] = BranchLayout(
            name=f"b{number}",
            first_rank=first,
            tensor_parallel_size=tp,
            pipeline_parallel_size=1,
            context_parallel_size=1,
            data_parallel_size=dp,
            rollout_tensor_parallel_size=rollout_tp,
        )
        first += tp * dp
    return Layout(branches=branches)


# --- placement ---------------------------------------------------------------------------------------------


def test_a_branch_is_not_cut_where_rank_order_would_cut_it() -> None:
    """4 + 8 + 4 ranks on nodes of 8."""
    placed = place(layout([(4, 1, 1), (4, 4, 2), (2, 1, 2)]), num_nodes=2, ranks_per_node=8)
    assert placed.node_of_rank == (0, 0, 0, 0, *[1] * 8, 0, 0, 0, 0)
    assert placed.spans == {"b0": 1, "b1": 1, "b2": 1}
    assert placed.num_idle == 0
    assert host_list(placed, ["x", "y"])[3:5] == ["x", "y"]


def test_whole_nodes_first_and_the_rest_in_one_piece() -> None:
    placed = place(layout([(2, 2, 5), (4, 1, 5), (2, 1, 1)]), num_nodes=4, ranks_per_node=8)
    assert placed.spans == {"b0": 2, "b1": 3, "b2": 1}
    assert placed.num_idle == 0


def test_idle_places_are_said() -> None:
    placed = place(layout([(4, 1, 1), (4, 1, 1), (4, 1, 1)]), num_nodes=2, ranks_per_node=8)
    assert placed.num_idle == 4
    assert placed.describe().endswith("; 4 of 16 places stay idle")


@settings(deadline=None, max_examples=200)
@given(
    sizes=st.lists(
        st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.integers(1, 9)),
        min_size=1,
        max_size=6,
    ),
    per_node=st.sampled_from([4, 6, 8]),
)
def test_no_node_is_overfull_no_block_is_cut_and_spans_are_least(sizes: Sizes, per_node: int) -> None:
    sizes = [(tp, rollout if (tp * dp) % rollout == 0 else 1, dp) for tp, rollout, dp in sizes]
    job = layout(sizes)
    placed = place(job, num_nodes=None, ranks_per_node=per_node)
    assert max(Counter(placed.node_of_rank).values()) <= per_node
    assert set(placed.node_of_rank) == set(range(placed.num_nodes))
    assert placed.node_of_rank[0] == 0
    for name, branch in job.branches.items():
        block = math.lcm(branch.tensor_parallel_size, branch.rollout_tensor_parallel_size)
        nodes = [placed.node_of_rank[rank] for rank in branch.ranks]
        for start in range(0, len(nodes), branch.tensor_parallel_size):
            assert len(set(nodes[start : start + branch.tensor_parallel_size])) == 1
        for start in range(0, len(nodes), branch.rollout_tensor_parallel_size):
            assert len(set(nodes[start : start + branch.rollout_tensor_parallel_size])) == 1
        least = math.ceil(len(nodes) / (per_node // block * block))
        assert len(set(nodes)) == placed.spans[name] == least
    again = place(job, num_nodes=placed.num_nodes, ranks_per_node=per_node)
    assert again == placed


def test_a_wrong_number_of_nodes_is_refused_with_the_right_one() -> None:
    job = layout([(4, 1, 2), (4, 1, 2), (8, 1, 1)])
    for nodes in (1, 2, 4):
        with pytest.raises(PlacementError, match=rf"that is 3 nodes of 8; the job has {nodes}\. .*--nodes=3"):
            place(job, num_nodes=nodes, ranks_per_node=8)
    with pytest.raises(PlacementError, match=r"--nodes=3 \(and --ntasks-per-node=4, which leaves nothing"):
        place(layout([(4, 1, 1)] * 3), num_nodes=4, ranks_per_node=6)


def test_tensor_parallelism_beyond_a_node_is_refused() -> None:
    with pytest.raises(PlacementError, match=r"branches\.b0: tensor parallelism 8 .* room for 4"):
        place(layout([(8, 1, 1)]), num_nodes=2, ranks_per_node=4)


# --- the check before a job --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("slurm_launch")
    make_model(root / "base", seed=1)
    make_domains(root / "data", num_train=4, num_validation=0)
    settings = {
        "model": {"path": str(root / "base"), "max_sequence_tokens": 512},
        "branch_defaults": {
            "parallel": {"tensor_model_parallel_size": 2},
            "data": {"max_prompt_tokens": 256},
            "rollout": {"max_new_tokens": 256},
        },
        "branches": {
            name: {"data": {"train": [str(root / "data" / f"{name}-train-*.tar")]}}
            for name in ("alpha", "beta")
        },
    }
    (root / "config.yaml").write_text(yaml.safe_dump(settings))
    return root / "config.yaml"


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The launcher's check, in a process where torch cannot be imported."""
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from copd_megatron.launch.slurm import main; sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60
    )


def test_the_check_prints_every_ranks_host_without_torch(config: Path) -> None:
    found = check(str(config), "run.seed=3", "--hosts", "n1,n2", "--ranks-per-node", "2")
    assert (found.returncode, found.stdout.split()) == (0, ["n1", "n1", "n2", "n2"]), found.stderr
    assert "4 ranks on 2 x 2: alpha on 1 node, beta on 1 node" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--hosts", "n1,n2,n3"], "that is 2 nodes of 2; the job has 3. Submit it with --nodes=2"),
        (["--hosts", "n1,n2", "optimizer.lrr=1"], "optimizer.lrr"),
        (["--hosts", "n1,n2", "model.path=/nowhere"], "/nowhere"),
        (["--hosts", "n1,n2", "branches.beta.data.train=[nowhere.tar]"], "no shard matches 'nowhere.tar'"),
    ],
)
def test_the_check_refuses_what_could_not_start(config: Path, arguments: list[str], says: str) -> None:
    found = check(str(config), "--ranks-per-node", "2", *arguments)
    assert (found.returncode, found.stdout) == (2, "")
    assert says in found.stderr


# --- srun's tasks ------------------------------------------------------------------------------------------

TASK = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_CPUS_PER_TASK": "6",
}


def test_a_task_of_srun_is_a_rank() -> None:
    assert step_environment(TASK) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu003",
        "MASTER_PORT": str(12000 + 12 * 101 + 1),
        "COPD_RUN_ID": "slurm-12-1-0",
        "OMP_NUM_THREADS": "6",
    }
    later = step_environment(TASK | {"SLURM_RESTART_COUNT": "2", "MASTER_ADDR": "10.0.0.1"})
    assert later["COPD_RUN_ID"] == "slurm-12-1-2"
    assert "MASTER_ADDR" not in later
    alone = step_environment(TASK | {"SLURM_STEP_NUM_NODES": "1"})
    assert alone["MASTER_ADDR"] == "127.0.0.1", "nobody else needs to reach it"


@pytest.mark.parametrize(
    "changed",
    [{"RANK": "0"}, {"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_STEP_NUM_TASKS": ""}],
    ids=["below torchrun", "a shell", "a batch script"],
)
def test_other_processes_are_not(changed: dict[str, str]) -> None:
    assert step_environment(TASK | changed) == {}


def test_a_task_bound_to_one_gpu_uses_that() -> None:
    assert step_environment(TASK | {"CUDA_VISIBLE_DEVICES": "5"})["LOCAL_RANK"] == "0"
    assert step_environment(TASK | {"CUDA_VISIBLE_DEVICES": "4,5"})["LOCAL_RANK"] == "1"
    alone = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "COPD_LAUNCHER": "srun"}
    assert step_environment(TASK | alone)["WORLD_SIZE"] == "1"


def test_variables_of_different_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="start the ranks with srun"):
        step_environment(TASK | {"SLURM_PROCID": "4"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n[3-9,11]", "n3"), ("a[01-02]b[7,9],c", "a01b7"), ("x,y[1-2]", "x"), ("g-[08]", "g-08")],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


# --- switches ----------------------------------------------------------------------------------------------


def edge(student: str, teacher: str) -> Edge:
    return Edge(
        student=student, teacher=teacher, prompts=teacher, beta=1.0, num_prompts=1, num_generations=1,
        objective="sampled_token", weight=1.0,
    )  # fmt: skip


def hub_edges(count: int) -> list[Edge]:
    pairs = [(f"b{i}", "b0") for i in range(1, count)]
    return [edge(a, b) for pair in pairs for a, b in (pair, pair[::-1])]


def test_a_branch_stays_on_its_switch_and_a_spoke_near_its_hub() -> None:
    """Hub of 2 nodes, spokes of 1 and 2, on switches of 3 nodes that SLURM names in turn."""
    job = layout([(4, 1, 4), (4, 1, 2), (4, 1, 4)])
    placed = place(job, num_nodes=5, ranks_per_node=8)
    hosts = [f"n{i}" for i in range(5)]
    switch_of = {host: f"s{i % 2}" for i, host in enumerate(hosts)}  # s0: n0, n2, n4; s1: n1, n3
    found = arrange(placed, job, hosts, switch_of, hub_edges(3))
    assert sorted(found.names) == hosts
    assert found.switches == {"b0": 1, "b1": 1, "b2": 1}
    assert found.far_edges <= 2
    given = arrange(placed, job, hosts, {}, hub_edges(3))
    assert given.names == tuple(hosts) and given.cost == 0


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=5),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_hosts_are_a_permutation_that_costs_no_more_than_the_given_order(
    sizes: list[int], per_switch: int, random: object
) -> None:
    from random import Random

    assert isinstance(random, Random)
    job = layout([(1, 1, 8 * size) for size in sizes])
    placed = place(job, num_nodes=sum(sizes), ranks_per_node=8)
    hosts = [f"n{i}" for i in range(sum(sizes))]
    shuffled = random.sample(hosts, len(hosts))
    switch_of = {host: str(i // per_switch) for i, host in enumerate(shuffled)}
    edges = hub_edges(len(sizes))
    found = arrange(placed, job, hosts, switch_of, edges)
    assert sorted(found.names) == sorted(hosts)
    nodes = {b: {placed.node_of_rank[r] for r in job.ranks_of(b)} for b in job.branch_names}
    for names, at_most in ((found.names, found.cost), (tuple(hosts), None)):
        spread = {b: {switch_of[names[n]] for n in nodes[b]} for b in nodes}
        cost = 100 * sum(len(s) - 1 for s in spread.values())
        cost += sum(not spread[e.student] & spread[e.teacher] for e in edges)
        assert cost == at_most if at_most is not None else cost >= found.cost
    if all(size <= per_switch for size in sizes) and len(set(sizes)) == 1 and per_switch % sizes[0] == 0:
        assert set(found.switches.values()) == {1}, "branches that fit switches are not split"


def test_slurms_topology_is_read() -> None:
    text = (
        "SwitchName=leaf1 Level=0 LinkSpeed=1 Nodes=gpu[001-003,7],x1\n"
        "SwitchName=leaf2 Level=0 LinkSpeed=1 Nodes=y\n"
        "SwitchName=spine Level=1 LinkSpeed=1 Nodes=gpu[001-003,7],x1,y Switches=leaf[1-2]\n"
    )
    found = switches(text)
    assert found == {**dict.fromkeys(["gpu001", "gpu002", "gpu003", "gpu7", "x1"], "leaf1"), "y": "leaf2"}
    assert switches("No topology information available") == {}
    assert hosts_of("a[8-11]b") == ["a8b", "a9b", "a10b", "a11b"]
