"""The newest step's metrics in Prometheus' text format: as a file, and over HTTP.

    copd_train_reward{branch="text",run="three_branch"} 0.41
    copd_overlap{k="10",edge="text-image",run="three_branch"} 0.62

The file is for node_exporter's textfile collector (``--collector.textfile.directory``); the endpoint is for a
Prometheus that scrapes the job itself. Both hold gauges of the last finished step, its number ``copd_step``
and the time when it ended: for a run that hangs, ``time() - copd_last_step_timestamp_seconds`` grows.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import Metric, generate_latest, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import Collector

from copd_megatron.config.schema import PrometheusConfig
from copd_megatron.errors import ConfigError
from copd_megatron.metrics.places import cannot_listen, check_textfile
from copd_megatron.untrusted.whole_file import replacing

logger = logging.getLogger(__name__)

_READABLE: Final = 0o644
"""The collector runs as another user, who must never see a file it cannot read."""

MAX_CLIENTS: Final = 8
"""Connections that are answered at once, and so threads of the endpoint."""
_CLIENT_SECONDS = 5.0
"""What a client gets to say something before its connection is closed."""

_PATTERNS = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"final/accuracy/(?P<model>[^/]+)/(?P<domain>.+)", "final_accuracy"),
        (r"copd/overlap@(?P<k>\d+)/(?P<edge>.+)", "overlap"),
        (r"copd/(?P<metric>[^/]+)/(?P<edge>.+)", "{metric}"),
        (r"(?P<branch>[^/]+)/cross/(?P<teacher>[^/]+)/(?P<metric>.+)", "cross_{metric}"),
        (r"(?P<branch>[^/]+)/validation/accuracy/(?P<domain>.+)", "validation_accuracy_by_domain"),
        (
            r"(?P<branch>[^/]+)/train/(?P<metric>reward|response_length|truncated_fraction)/(?P<domain>.+)",
            "train_{metric}_by_domain",
        ),
        (r"(?P<branch>[^/]+)/(?P<metric>.+)", "{metric}"),
        (r"(?P<metric>.+)", "{metric}"),
    )
)
"""Which parts of a metric's path are labels; the first pattern that fits counts."""


def sample_name(path: str) -> tuple[str, dict[str, str]]:
    """The name and labels in Prometheus of a metric's path.

    >>> sample_name("text/timing/generation_seconds")
    ('copd_timing_generation_seconds', {'branch': 'text'})
    """
    for pattern, name in _PATTERNS:
        if match := pattern.fullmatch(path):
            labels = match.groupdict()
            metric = labels.pop("metric", "")
            return "copd_" + re.sub(r"[^a-zA-Z0-9_]", "_", name.format(metric=metric)), labels
    raise AssertionError("the last pattern fits everything")


class LastStep(Collector):
    """The gauges of the newest step and, at the end, of the final table; a library's ``Collector``, read by
    several threads."""

    def __init__(self, run: str, clock: Callable[[], float] = time.time) -> None:
        """
        Args:
            run: value of the label ``run``.
            clock: Unix time, in seconds.
        """
        self._run, self._clock = run, clock
        self._families: tuple[Metric, ...] = ()
        self._shown: tuple[int, str, Mapping[str, float]] = (0, "", {})

    def show(self, step: int, phase: str, metrics: Mapping[str, float]) -> None:
        """Replaces what is shown by a step that has just ended."""
        self._shown = (step, phase, metrics)
        families: dict[str, Metric] = {}

        def add(name: str, text: str, labels: Mapping[str, str], value: float) -> None:
            family = families.setdefault(name, Metric(name, text, "gauge"))
            family.add_sample(name, {**labels, "run": self._run}, value)

        add("copd_step", "Steps done.", {}, float(step))
        add("copd_last_step_timestamp_seconds", "When the last step ended.", {}, self._clock())
        add("copd_phase_info", "Phase of the last step.", {"phase": phase}, 1.0)
        for path, value in metrics.items():
            name, labels = sample_name(path)
            add(name, f"{path} in metrics.jsonl", labels, value)
        self._families = tuple(families[name] for name in sorted(families))

    def add(self, figures: Mapping[str, float]) -> None:
        """Shows figures of the whole run beside the last step's."""
        step, phase, metrics = self._shown
        self.show(step, phase, {**metrics, **figures})

    def collect(self) -> Iterable[Metric]:
        """The families of the step, by name; none before the first one."""
        return self._families


class PrometheusTextfile:
    """A ``writers.Writer`` that replaces one ``.prom`` file each step, as a whole: a reader sees the old step
    or the new one. A folder that cannot be written during the run costs a warning, not the run."""

    def __init__(
        self, path: str | os.PathLike[str], *, run: str, clock: Callable[[], float] = time.time
    ) -> None:
        """
        Raises:
            ConfigError: the folder does not exist or cannot be written.
        """
        self.path, self._step = Path(path), LastStep(run, clock)
        self._failed = False
        check_textfile(PrometheusConfig(textfile=str(self.path)))

    def write(self, step: int, phase: str, metrics: Mapping[str, float]) -> None:
        """Shows one step."""
        self._step.show(step, phase, metrics)
        self._replace()

    def finish(self, step: int, figures: Mapping[str, float]) -> None:
        """Adds the figures to the last step."""
        self._step.add(figures)
        self._replace()

    def _replace(self) -> None:
        # node_exporter reads *.prom, so the unfinished file has another ending
        try:
            with replacing(self.path, mode=_READABLE) as file:
                file.write(generate_latest(self._step))
        except OSError as error:
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


class _Handler(WSGIRequestHandler):
    """One request, from a client that may be slow or silent."""

    timeout = _CLIENT_SECONDS

    def log_message(self, format: str, *arguments: object) -> None:
        """To the log, where debugging is asked for."""
        logger.debug("prometheus: %s", format % arguments)


class _BoundedServer(ThreadingWSGIServer):
    """A thread per client, for ``MAX_CLIENTS`` at most: to serve one more, the one that has been connected
    for longest is cut off. A scrape takes milliseconds, so that is one who stays silent or does not
    listen."""

    request_queue_size = 64

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._free = threading.Semaphore(MAX_CLIENTS)
        self._clients: dict[Any, None] = {}
        """Sockets in the order in which they came."""
        self._lock = threading.Lock()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts a thread for a client, once there is one to be had."""
        if not self._free.acquire(blocking=False):
            self._cut_off_the_oldest()
            self._free.acquire()
        with self._lock:
            self._clients[request] = None
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread to be had: the caller reports that and closes the connection
            self._forget(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serves a client, in its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._forget(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was too slow, or left: nobody's concern but its own."""
        logger.debug("prometheus: no answer to %s", client_address, exc_info=True)

    def _cut_off_the_oldest(self) -> None:
        with self._lock, contextlib.suppress(OSError):  # it may just have been closed
            for request in list(self._clients)[:1]:
                request.shutdown(socket.SHUT_RDWR)

    def _forget(self, request: Any) -> None:
        with self._lock:
            self._clients.pop(request, None)
        self._free.release()


class PrometheusEndpoint:
    """A ``writers.Writer`` that answers ``GET /metrics`` with the newest step, from threads of its own."""

    def __init__(self, host: str, port: int, *, run: str, clock: Callable[[], float] = time.time) -> None:
        """
        Args:
            port: 0: any free one (``port`` says which).

        Raises:
            ConfigError: the address is taken or does not belong to this machine.
        """
        self._step = LastStep(run, clock)
        try:
            self._server = make_server(
                host, port, make_wsgi_app(self._step), server_class=_BoundedServer, handler_class=_Handler
            )
        except OSError as error:
            raise ConfigError(cannot_listen(host, port, error)) from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="copd-prometheus", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """The TCP port that it listens on."""
        return int(self._server.server_address[1])

    def write(self, step: int, phase: str, metrics: Mapping[str, float]) -> None:
        """Shows one step."""
        self._step.show(step, phase, metrics)

    def finish(self, step: int, figures: Mapping[str, float]) -> None:
        """Adds the figures to the last step."""
        self._step.add(figures)

    def truncate_after(self, step: int) -> None:
        """Nothing to forget: the endpoint holds one step."""

    def close(self, *, failed: bool = False) -> None:
        """Stops answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
