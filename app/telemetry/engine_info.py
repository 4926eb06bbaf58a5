"""What an engine computes with, as a metric."""

from __future__ import annotations

from prometheus_client.metrics_core import Metric

from app.telemetry.families import Families
from batching.worker.pool_protocol import PoolCapabilities
from batching.worker.protocol import Capabilities


def info_family(families: Families, capabilities: Capabilities | PoolCapabilities | None) -> Metric:
    """What the engine computes with, and whether it warned that this is not as it should be."""
    c = capabilities
    facts = {
        "device": c.device if c else "",
        "dtype": c.dtype if c else "",
        "degraded": "true" if c and c.warnings else "false",
    }
    return families.info("slipstream_engine_info", "What the engine computes with.", facts)
