"""How the ranks of one machine stay out of reach of all others. No torch."""

from __future__ import annotations

import socket


def only_this_machine() -> dict[str, str]:
    """Variables that keep the sockets of Gloo, NCCL and vLLM on the loopback interface, which no other
    machine can reach."""
    interface = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "lo")
    return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface, "VLLM_HOST_IP": "127.0.0.1"}
