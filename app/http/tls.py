"""HTTPS, for where no proxy in front of the server ends it."""

from __future__ import annotations

import ssl
from typing import Any

from config.settings import ServerSettings


class TlsError(ValueError):
    """The certificates cannot be used; the message is one line that says why."""


def tls_options(settings: ServerSettings) -> dict[str, Any]:
    """What uvicorn is told, tried before a model is loaded; empty: plain HTTP.

    Raises `TlsError`.
    """
    if not settings.tls_cert:
        return {}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key or None)
        if settings.tls_client_ca:
            context.load_verify_locations(settings.tls_client_ca)
    except OSError as error:  # ssl.SSLError is one
        files = (settings.tls_cert, settings.tls_key, settings.tls_client_ca)
        raise TlsError(f"cannot use {', '.join(filter(None, files))} for TLS: {error}") from error
    return {
        "ssl_certfile": settings.tls_cert,
        "ssl_keyfile": settings.tls_key or None,
        "ssl_ca_certs": settings.tls_client_ca or None,
        "ssl_cert_reqs": ssl.CERT_REQUIRED if settings.tls_client_ca else ssl.CERT_NONE,
    }
