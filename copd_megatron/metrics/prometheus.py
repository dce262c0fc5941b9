"""The newest step's metrics in Prometheus' text format: as a file, and over HTTP.

    copd_train_reward{branch="text",run="three_branch"} 0.41
    copd_overlap{k="10",edge="text-image",run="three_branch"} 0.62

The file is for node_exporter's textfile collector (``--collector.textfile.directory``); the endpoint is for a
Prometheus that scrapes the job itself. Both hold gauges of the last finished step, ``copd_step`` and the time
it ended: a run that hangs shows as ``time() - copd_last_step_timestamp_seconds`` that grows.
"""

from __future__ import annotations

import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from copd_megatron.errors import ConfigError

logger = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_PATTERNS = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"copd/overlap@(?P<k>\d+)/(?P<edge>.+)", "overlap"),
        (r"copd/(?P<metric>[^/]+)/(?P<edge>.+)", "{metric}"),
        (r"(?P<branch>[^/]+)/cross/(?P<teacher>[^/]+)/(?P<metric>.+)", "cross_{metric}"),
        (r"(?P<branch>[^/]+)/validation/accuracy/(?P<domain>.+)", "validation_accuracy_by_domain"),
        (r"(?P<branch>[^/]+)/(?P<metric>.+)", "{metric}"),
        (r"(?P<metric>.+)", "{metric}"),
    )
)
"""Which parts of a metric's path are labels; the first pattern that fits counts."""


def sample_name(path: str) -> tuple[str, dict[str, str]]:
    """A metric's path as Prometheus' name and labels.

    >>> sample_name("text/timing/generation_seconds")
    ('copd_timing_generation_seconds', {'branch': 'text'})
    """
    for pattern, name in _PATTERNS:
        if match := pattern.fullmatch(path):
            labels = match.groupdict()
            metric = labels.pop("metric", "")
            return "copd_" + re.sub(r"[^a-zA-Z0-9_]", "_", name.format(metric=metric)), labels
    raise AssertionError("the last pattern fits everything")


def render(step: int, phase: str, metrics: Mapping[str, float], *, run: str, now: float) -> str:
    """One step in the text format, sorted by name.

    Args:
        now: Unix time at which the step ended.
    """
    samples: dict[str, list[tuple[dict[str, str], float]]] = {
        "copd_step": [({}, float(step))],
        "copd_last_step_timestamp_seconds": [({}, now)],
        "copd_phase_info": [({"phase": phase}, 1.0)],
    }
    for path, value in metrics.items():
        name, labels = sample_name(path)
        samples.setdefault(name, []).append((labels, value))
    lines = []
    for name, entries in sorted(samples.items()):
        lines.append(f"# TYPE {name} gauge")
        for labels, value in entries:
            inside = ",".join(f'{key}="{_escape(text)}"' for key, text in {**labels, "run": run}.items())
            lines.append(f"{name}{{{inside}}} {_number(value)}")
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return repr(value) if math.isfinite(value) else ("+Inf" if value > 0 else "-Inf")


class PrometheusTextfile:
    """A ``writers.Writer`` that replaces one ``.prom`` file each step, as a whole: a reader sees the old step
    or the new one. A folder that cannot be written during the run costs a warning, not the run."""

    def __init__(
        self, path: str | os.PathLike[str], *, run: str, clock: Callable[[], float] = time.time
    ) -> None:
        """
        Raises:
            ConfigError: the folder is not there or cannot be written.
        """
        self.path, self._run, self._clock = Path(path), run, clock
        self._failed = False
        if not os.access(self.path.parent, os.W_OK):
            raise ConfigError(
                f"logging.prometheus.textfile: {self.path.parent} is no folder that this user can write; "
                "make it, or give the one of node_exporter's --collector.textfile.directory"
            )

    def write(self, step: int, phase: str, metrics: Mapping[str, float]) -> None:
        """Shows one step."""
        text = render(step, phase, metrics, run=self._run, now=self._clock())
        # node_exporter reads *.prom, so the unfinished file has another ending
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        try:
            partial.write_text(text, encoding="utf-8")
            partial.chmod(0o644)  # the collector is another user
            partial.replace(self.path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            if not self._failed:
                logger.warning("metrics are not written to %s: %s; the run goes on", self.path, error)
            self._failed = True
            return
        if self._failed:
            logger.warning("metrics are written to %s again", self.path)
        self._failed = False

    def truncate_after(self, step: int) -> None:
        """Nothing to forget: the file holds one step."""

    def close(self, *, failed: bool = False) -> None:
        """Leaves the last step; its time says that it is old."""


class PrometheusEndpoint:
    """A ``writers.Writer`` that answers ``GET /metrics`` with the newest step, from a thread of its own."""

    def __init__(self, host: str, port: int, *, run: str, clock: Callable[[], float] = time.time) -> None:
        """
        Args:
            port: 0: any free one (``port`` says which).

        Raises:
            ConfigError: the address is taken or not this machine's.
        """
        self._run, self._clock = run, clock
        self._text = b""
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                found = self.path.partition("?")[0] in ("/metrics", "/")
                body = endpoint._text if found else b"metrics are at /metrics\n"
                self.send_response(200 if found else 404)
                self.send_header("Content-Type", CONTENT_TYPE)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:
                logger.debug("prometheus: %s", format % arguments)

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise ConfigError(
                f"logging.prometheus.port: cannot listen on {host}:{port} ({error.strerror}); choose another "
                "port, or null"
            ) from error
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="copd-prometheus", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def write(self, step: int, phase: str, metrics: Mapping[str, float]) -> None:
        """Shows one step."""
        self._text = render(step, phase, metrics, run=self._run, now=self._clock()).encode()

    def truncate_after(self, step: int) -> None:
        """Nothing to forget: the endpoint holds one step."""

    def close(self, *, failed: bool = False) -> None:
        """Stops answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
