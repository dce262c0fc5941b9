"""Before a run starts: can its metrics be shown where the settings say?"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from copd_megatron.config.schema import PrometheusConfig
from copd_megatron.errors import ConfigError


def check_textfile(options: PrometheusConfig) -> None:
    """Raises ConfigError if the folder of ``textfile`` does not exist or cannot be written."""
    if options.textfile is None:
        return
    folder = Path(options.textfile).parent
    if not os.access(folder, os.W_OK | os.X_OK) or not folder.is_dir():
        raise ConfigError(
            f"logging.prometheus.textfile: {folder} is not a folder that you can write to; "
            "create it, or give the folder of node_exporter's --collector.textfile.directory"
        )


def check_port(options: PrometheusConfig) -> None:
    """Raises ConfigError if ``port`` is taken, or ``host`` is no address of this machine."""
    if options.port is None:
        return
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will
            probe.bind((options.host, options.port))
    except OSError as error:
        raise ConfigError(cannot_listen(options.host, options.port, error)) from error


def cannot_listen(host: str, port: int, error: OSError) -> str:
    """The message for an address that cannot be listened on."""
    return (
        f"logging.prometheus.port: cannot listen on {host}:{port} ({error.strerror}); choose another "
        "port, or null"
    )
