"""Who may ask for what (issue: read-only, loopback unless told otherwise, and then with a token).

    /healthz, /readyz                open: probes come as they are, with any Host
    /metrics                         any Host; the optional `metrics_token`
    the page, its files, /api/*      an allowed Host, from this origin, and the token, or, without one, from loopback

A Host that is not allowed is turned away even with the token, and even on loopback: a page of another site can make a
name of its own resolve to 127.0.0.1 (DNS rebinding), but it cannot choose the Host header. Tokens come as
`Authorization: Bearer TOKEN`, or as the password of Basic authentication, which browsers ask for and then send with
event streams too, so that there is no cookie, no login page, and nothing in any URL.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from obsdag.errors import ConfigError

__all__ = ["LOOPBACK_HOSTS", "SECURITY_HEADERS", "Guard", "Refusal"]

LOOPBACK_HOSTS: Final = ("localhost", "127.0.0.1", "[::1]")

_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

SECURITY_HEADERS: Final[dict[str, str]] = {
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
"""On every answer, whatever it is."""


class Refusal(NamedTuple):
    """Why a request is not answered: status, a sentence for who asked, further headers."""

    status: int
    text: str
    headers: dict[str, str]


class Guard:
    """Judges requests by their headers and the client's address; keeps no state.

    token, metrics_token: None for none. allowed_hosts: names without ports, compared without case; "*" for any.
    """

    def __init__(self, token: str | None, metrics_token: str | None, allowed_hosts: Iterable[str]) -> None:
        self._token = _token_bytes("token", token)
        self._metrics_token = _token_bytes("metrics_token", metrics_token)
        if isinstance(allowed_hosts, str):
            raise ConfigError(f"allowed_hosts must be several names: write [{allowed_hosts!r}]")
        self._hosts = frozenset(_host_name(host) for host in allowed_hosts)
        if "" in self._hosts:
            raise ConfigError("allowed_hosts must be host names without a port, or '*' for any host")

    def metrics(self, headers: Mapping[str, str]) -> Refusal | None:
        """For `/metrics`."""
        if self._metrics_token is None or _has_token(headers, self._metrics_token):
            return None
        return _unauthorized()

    def private(self, headers: Mapping[str, str], client: Any) -> Refusal | None:
        """For the page and the API."""
        host = headers.get("host", "")
        if "*" not in self._hosts and _host_name(host) not in self._hosts:
            return Refusal(421, "This host name is not in allowed_hosts.", {})
        if not _is_from_here(headers, host):
            return Refusal(403, "Requests from other origins are not answered.", {})
        if self._token is not None:
            return None if _has_token(headers, self._token) else _unauthorized()
        if not _is_loopback(client):
            return Refusal(403, "Without a token only this machine is answered: start with token=...", {})
        return None


def _token_bytes(name: str, token: str | None) -> bytes | None:
    if token is None:
        return None
    if not isinstance(token, str) or len(token) < 8 or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(f"{name} must be at least 8 printable ASCII characters without spaces, or None")
    return token.encode()


def _host_name(host: str) -> str:
    """A Host header, or an entry of allowed_hosts, without its port; "" for what is none."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[: host.find("]") + 1]
    return host.partition(":")[0].rstrip(".")


def _is_from_here(headers: Mapping[str, str], host: str) -> bool:
    """Whether a browser asks for a page of ours, or opens the page itself: a link from elsewhere may lead to it."""
    origin = headers.get("origin")
    if origin is not None:
        try:
            if urlsplit(origin).netloc.lower() != host.strip().lower():
                return False
        except ValueError:
            return False
    site = headers.get("sec-fetch-site", "none")
    opens_page = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return site in ("none", "same-origin") or opens_page


def _has_token(headers: Mapping[str, str], token: bytes) -> bool:
    kind, _, given = headers.get("authorization", "").partition(" ")
    credentials = given.strip().encode("utf-8", "replace")
    if kind.lower() == "basic":
        try:
            credentials = base64.b64decode(credentials, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return False
    elif kind.lower() != "bearer":
        return False
    return hmac.compare_digest(credentials, token)


def _is_loopback(client: Any) -> bool:
    try:
        address = ipaddress.ip_address(str(client[0]).partition("%")[0])
    except (TypeError, IndexError, ValueError):  # a Unix socket, a proxy that hides it: nobody we know
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def _unauthorized() -> Refusal:
    return Refusal(401, "A token is needed.", {"www-authenticate": 'Basic realm="obsdag", charset="UTF-8"'})
