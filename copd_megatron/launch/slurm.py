"""Before a SLURM job starts its ranks: does the configuration fit the nodes, and which rank runs where?

    python -m copd_megatron.launch.slurm CONFIG [key=value ...] --hosts n1,n2 --ranks-per-node 8

prints the host of every rank, one per line, for srun's arbitrary distribution, and on stderr what that means.
Exits with 2 and a message when the run could not start. Needs neither torch nor a GPU; takes a second.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from copd_megatron.config import ConfigError, load_config, read_model_shapes, validate
from copd_megatron.config.graph import build_graph
from copd_megatron.launch.placement import PlacementError, host_list, place
from copd_megatron.launch.preflight import check_run
from copd_megatron.launch.switches import arrange
from copd_megatron.topology.layout import Layout
from copd_megatron.topology.slurm import switches
from copd_megatron.untrusted.visible import visible


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m copd_megatron.launch.slurm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--hosts", required=True, help="names of the job's nodes, separated by commas")
    parser.add_argument(
        "--topology", default="", help="what scontrol --oneliner show topology prints: the nodes' switches"
    )
    parser.add_argument("--ranks-per-node", required=True, type=int, help="GPUs per node")
    arguments = parser.parse_intermixed_args(argv)
    hosts = [host for host in arguments.hosts.split(",") if host]
    try:
        config = load_config(arguments.config, arguments.overrides)
        layout = Layout.from_config(config)
        placement = place(layout, num_nodes=len(hosts), ranks_per_node=arguments.ranks_per_node)
        validate(config, world_size=layout.world_size, model=read_model_shapes(config))
        check_run(config)
    except (ConfigError, PlacementError, FileNotFoundError, ValueError) as error:
        print(visible(f"copd: {error}"), file=sys.stderr)
        return 2
    known = switches(arguments.topology)
    arranged = arrange(placement, layout, hosts, known, build_graph(config).edges)
    print("\n".join(host_list(placement, arranged.names)))
    print(f"copd: {placement.describe()}", file=sys.stderr)
    if known:
        print(f"copd: {arranged.describe()}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
