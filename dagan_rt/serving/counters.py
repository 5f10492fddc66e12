"""What a server counts itself, and since when: the model's Prometheus counters and Triton's statistics."""

from __future__ import annotations

import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from dagan_rt.errors import InputError, require
from dagan_rt.serving.protocol import MODEL
from dagan_rt.serving.transport import Address

MOST_METRICS = 16 << 20  # bytes
TIMEOUT = 10.0  # seconds
REFRESH = 1.5  # seconds after which the model's counters hold all that was before
_LINE = re.compile(r"^(dagan_\w+)\{([^}]*)\}\s+([-+.\deE]+)\s*$", re.MULTILINE)


def metrics_url(server: str) -> str:
    """Where a server at this URL tells its metrics, if its ports are in a row, as 8000, 8001 and 8002 are.

    A server does not say where. At 8002 whatever its own ports are, another server's may be found.
    """
    address = Address.parse(server)
    return f"{Address('http', address.host, address.port + (1 if address.is_grpc else 2))}/metrics"


def read_metrics(url: str, model: str = MODEL) -> dict[str, float]:
    """Our counters and gauges of one model by name, summed over its instances; InputError where they are not there."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"metrics must be read from a URL like http://host:8002/metrics, got {url!r}")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            text = answer.read(MOST_METRICS).decode("utf-8", "replace")
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(f"metrics cannot be read from {url}: {reason}") from None
    found = parse_metrics(text, model)
    if not found:
        raise InputError(f"{url} tells nothing of the model {model}: is it another server's?")
    return found


def parse_metrics(text: str, model: str) -> dict[str, float]:
    """Of Prometheus' text format: our counters of a model, summed over its instances."""
    sums: dict[str, float] = {}
    for name, labels, value in _LINE.findall(text):
        if f'model="{model}"' in labels.split(","):
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums


def read_statistics(url: str, model: str = MODEL) -> dict[str, Any]:
    """Triton's own statistics of a model: executions, requests in them, and how often an execution held how many."""
    parts = urlsplit(url)
    kind = "grpc" if parts.scheme.startswith("grpc") else "http"
    module = require(f"tritonclient.{kind}", extra="triton", why="reading a server's statistics")
    secure = parts.scheme in ("grpcs", "https")
    try:
        with module.InferenceServerClient(parts.netloc, ssl=secure) as client:
            more = {"as_json": True} if kind == "grpc" else {}
            found = client.get_inference_statistics(model, **more)["model_stats"][0]
    except (OSError, module.InferenceServerException) as error:
        said = error.message() if isinstance(error, module.InferenceServerException) else error
        raise InputError(f"{url} does not tell its statistics of {model}: {said}") from None
    return {
        "executions": int(found.get("execution_count", 0)),
        "requests": int(found.get("inference_count", 0)),
        "sizes": {int(it["batch_size"]): int(it["compute_infer"].get("count", 0))
                  for it in found.get("batch_stats", ())},
    }  # fmt: skip


@dataclass(frozen=True)
class Counters:
    """One reading; `metrics` is empty where the server's could not be read, and `reason` says why."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    statistics: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""

    @classmethod
    def read(cls, url: str, metrics: str = "") -> Counters:
        """metrics: the URL, which must then work; "" tries `metrics_url`."""
        statistics = read_statistics(url)
        try:
            return cls(read_metrics(metrics or metrics_url(url)), statistics)
        except InputError as error:
            if metrics:
                raise
            return cls({}, statistics, f"{error}; if they are elsewhere, name the URL with --metrics")

    def since(self, before: Counters) -> dict[str, float]:
        """What happened between two readings, as values of a row; their names end with the unit."""
        values: dict[str, float] = {}
        if self.metrics and before.metrics:
            count = {name: value - before.metrics.get(name, 0.0) for name, value in self.metrics.items()}
            driven, batches = count.get("dagan_frames_driven", 0.0), count.get("dagan_batches", 0.0)
            values["server frames"], values["server batches"] = driven, batches
            values["server refusals"] = count.get("dagan_requests_refused", 0.0)
            values["server failures"] = count.get("dagan_frames_failed", 0.0)
            for name in ("queue", "compute"):
                if driven and (total := f"dagan_frame_{name}_us") in count:
                    values[f"{name} ms"] = count[total] / driven / 1e3
            if batches:
                values["frames/batch"] = driven / batches
        executions, requests = (self.statistics[it] - before.statistics[it] for it in ("executions", "requests"))
        values["triton executions"], values["triton requests"] = float(executions), float(requests)
        if executions > 0:
            values["requests/execution"] = requests / executions
        known = before.statistics["sizes"]
        sizes = [size for size, times in self.statistics["sizes"].items() if times > known.get(size, 0)]
        return values | {"largest execution": float(max(sizes, default=0))}
