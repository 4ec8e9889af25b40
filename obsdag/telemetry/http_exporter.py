"""The official OTLP/HTTP exporter, handed bytes of our own encoder (see `encode`); needs `obsdag[otlp]`."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any, Final

import requests
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult

from obsdag.telemetry.encode import encode_request

__all__ = ["HttpExporter"]

_COUNTED: Final = "OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED"
_log = logging.getLogger("obsdag.tracing")


class HttpExporter(OTLPSpanExporter):
    """Endpoint, headers, TLS, compression, retries and time-outs are the official exporter's, and so is all of it where
    its client cannot be handed bytes (other versions of it), or where it is to count what it does.
    """

    def __init__(self, endpoint: str | None) -> None:
        super().__init__(endpoint=endpoint)
        session = getattr(getattr(getattr(self, "_client", None), "_transport", None), "_session", None)
        if type(session) is requests.Session and session.trust_env:
            _ask_environment_once(session, self._endpoint)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Sends one batch."""
        client: Any = getattr(self, "_client", None)
        counted = os.environ.get(_COUNTED, "").strip().lower() == "true"
        if self._shutdown or counted or not callable(getattr(client, "export", None)):
            return super().export(spans)
        try:
            body = encode_request(spans)
        except Exception:
            _log.debug("left to the official encoder", exc_info=True)
            return super().export(spans)
        if 0 < getattr(self, "_max_request_size", 0) < len(body):
            return super().export(spans)  # which refuses it, and says so
        return SpanExportResult.SUCCESS if client.export(body).success else SpanExportResult.FAILURE


def _ask_environment_once(session: requests.Session, url: str) -> None:
    """Proxies, certificates and the `.netrc` that hold for `url`: looking for them takes half as long as a request, and
    would be done for each.
    """
    found = session.merge_environment_settings(url, {}, None, None, None)
    session.proxies, session.verify = found["proxies"], found["verify"]
    session.auth = session.auth or requests.utils.get_netrc_auth(url)
    session.trust_env = False
