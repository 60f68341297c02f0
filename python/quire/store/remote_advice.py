"""What to tell a person when a server refuses: one sentence on what to do next."""

from __future__ import annotations

import errno
import socket
import urllib.parse

__all__ = ["advice_for_error", "advice_for_status", "public_url"]

CREDENTIALS = {
    "http": "pass headers=, token= or username= and password= in storage_options",
    "s3": "pass access_key_id, secret_access_key (and session_token) in storage_options, or set "
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for a public bucket pass anon=True",
    "gs": "pass service_account in storage_options, or set GOOGLE_APPLICATION_CREDENTIALS; for a "
    "public bucket pass anon=True",
    "az": "pass account_name and account_key (or sas_token) in storage_options, or set "
    "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY; for a public container pass "
    "anon=True",
}


def public_url(url: str) -> str:
    """``url`` without what may be secret: user, password, query and fragment.

    >>> public_url("https://me:secret@host/x.npy?X-Amz-Signature=1")
    'https://host/x.npy'
    """
    scheme = url.partition("://")[0]
    if scheme not in ("http", "https"):
        return url
    parts = urllib.parse.urlsplit(url)
    return f"{scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def advice_for_status(status: int, scheme: str) -> str:
    """The next step after an HTTP status; ``scheme`` as in the URL."""
    family = "http" if scheme in ("http", "https") else scheme
    if status in (401, 403):
        return f"access is refused; {CREDENTIALS.get(family, CREDENTIALS['http'])}"
    if status in (404, 410):
        return "nothing is there; check the spelling of the host, bucket and path"
    if status == 407:
        return "the proxy wants credentials; put them into proxy_url or the *_proxy variable"
    if status == 429:
        return "the server is asked too often; try later, or allow more by retry_config"
    if status >= 500:
        return "the server fails; try later, allow more by retry_config, or ask who runs it"
    if 300 <= status < 400:
        return "the redirect says not where to; open the URL it leads to"
    return "the server does not serve this URL that way; try it with curl -r 0-0 -i URL"


def advice_for_error(error: OSError, where: str) -> str:
    """The next step after a connection failed; ``where`` is host:port."""
    if type(error).__name__ == "SSLCertVerificationError":
        return (
            f"the certificate of {where} is not trusted; give its authority by root_certificate= "
            "(PEM text) in storage_options or SSL_CERT_FILE, or for a test server pass "
            "allow_invalid_certificates=True"
        )
    if type(error).__module__ == "ssl":
        return f"{where} does not speak TLS as expected; check whether the URL must be http://"
    if isinstance(error, socket.gaierror):
        return f"the name of {where} is not known; check its spelling and the network"
    if error.errno == errno.ECONNREFUSED:
        return f"nothing listens at {where}; start the server, or check host and port"
    if error.errno == errno.ETIMEDOUT or isinstance(error, TimeoutError):
        return f"{where} does not answer in time; check the network, or pass a longer timeout="
    if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
        return f"there is no way to {where}; check the network and any proxy"
    return f"the connection to {where} failed; check the server, then try again"
