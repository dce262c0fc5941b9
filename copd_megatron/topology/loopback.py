"""What the ranks of one machine are told, and how they stay out of reach of all others. No torch."""

from __future__ import annotations

import socket


def only_this_machine() -> dict[str, str]:
    """Variables that keep the sockets of Gloo, NCCL and vLLM on the loopback interface, which no other
    machine can reach."""
    interface = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "lo")
    return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface, "VLLM_HOST_IP": "127.0.0.1"}


def rank_environment(rank: int, num_ranks: int, port: int, *, agent_store: bool = True) -> dict[str, str]:
    """What torchrun tells a rank of one machine.

    Args:
        port: of the store, on the loopback address.
        agent_store: whoever starts the ranks serves it; else rank 0 must.
    """
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": str(agent_store),
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
