"""``storage_options`` of s3://, gs:// and az:// sources, in obstore's and fsspec's spelling.

==========================  ==================================================================
obstore                     fsspec (s3fs, gcsfs, adlfs)
==========================  ==================================================================
``access_key_id``           ``key``
``secret_access_key``       ``secret``
``session_token``           ``token``
``skip_signature``          ``anon`` (gcsfs: ``token="anon"``)
``endpoint``                ``endpoint_url``, also in ``client_kwargs``
``region``                  ``region_name`` in ``client_kwargs``
``request_payer``           ``requester_pays``
``client_options``          ``use_ssl``, ``verify`` in ``client_kwargs``
``sas_key``                 ``sas_token``, or in ``connection_string``
==========================  ==================================================================

Any other name goes to obstore as it is, which refuses those it does not know. What is not given
comes from the usual environment variables (``AWS_*``, ``GOOGLE_*``, ``AZURE_*``); ``profile`` or
``AWS_PROFILE`` takes S3 credentials from the AWS configuration files, which needs boto3. An
endpoint that begins with ``http://`` is taken at its word: ``allow_http`` need not be given.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quire.errors import SourceError
from quire.store.retry import RetryPolicy

__all__ = ["FAMILIES", "CloudOptions"]

FAMILIES = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gs",
    "gcs": "gs",
    "az": "az",
    "azure": "az",
    "adl": "az",
    "abfs": "az",
    "abfss": "az",
}
"""URL scheme to family of options."""

SPELLINGS = {
    "s3": {
        "key": "access_key_id",
        "secret": "secret_access_key",
        "token": "session_token",
        "anon": "skip_signature",
        "endpoint_url": "endpoint",
        "region_name": "region",
        "requester_pays": "request_payer",
    },
    "gs": {"anon": "skip_signature", "endpoint_url": "base_url"},
    "az": {"anon": "skip_signature", "sas_token": "sas_key", "endpoint_url": "endpoint"},
}
ANONYMOUS = "anon"
ENDPOINT_VARIABLES = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
ENDPOINT = re.compile("endpoint|base_url")
CLIENT_OPTIONS = frozenset(
    [
        "allow_http",
        "allow_invalid_certificates",
        "connect_timeout",
        "default_headers",
        "http1_only",
        "http2_only",
        "pool_idle_timeout",
        "pool_max_idle_per_host",
        "proxy_url",
        "proxy_ca_certificate",
        "proxy_excludes",
        "read_timeout",
        "root_certificate",
        "timeout",
        "user_agent",
    ]
)
WITHOUT_MEANING = frozenset(
    [
        "asynchronous",
        "block_size",
        "cache_options",
        "cache_regions",
        "cache_timeout",
        "cache_type",
        "check_connection",
        "config_kwargs",
        "consistency",
        "default_block_size",
        "default_cache_type",
        "default_fill_cache",
        "fill_cache",
        "max_concurrency",
        "project",
        "s3_additional_kwargs",
        "skip_instance_cache",
        "use_listings_cache",
        "version_aware",
    ]
)
CONNECTION_STRING = {
    "AccountName": "account_name",
    "AccountKey": "account_key",
    "SharedAccessSignature": "sas_key",
    "BlobEndpoint": "endpoint",
}


@dataclass(frozen=True)
class CloudOptions:
    """Checked options; picklable, and never shown because they hold credentials."""

    family: str
    config: dict[str, object] = field(default_factory=dict, repr=False)
    client: dict[str, object] = field(default_factory=dict, repr=False)
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    profile: str | None = None

    @classmethod
    def from_storage_options(
        cls, family: str, options: Mapping[str, object] | None
    ) -> CloudOptions:
        """Takes over what the user gave, in obstore's words.

        Raises:
            quire.SourceError: a value of the wrong type; the message names the option.

        >>> CloudOptions.from_storage_options("s3", {"key": "k", "anon": False}).config
        {'access_key_id': 'k', 'skip_signature': False}
        """
        rest = dict(options or {})
        retry = RetryPolicy.from_config(rest.pop("retry_config", None))
        profile = rest.pop("profile", None)
        client = _dict_of(rest, "client_options")
        for name in ("client_kwargs", "config", "storage_options"):
            rest = {**_dict_of(rest, name), **rest}
        if "use_ssl" in rest:
            client.setdefault("allow_http", not rest.pop("use_ssl"))
        if rest.pop("verify", True) is False:
            client.setdefault("allow_invalid_certificates", True)
        client.update({name: rest.pop(name) for name in CLIENT_OPTIONS & rest.keys()})
        if family == "gs":
            _take_google_token(rest)
        if family == "az":
            _take_azure_strings(rest)
        words = SPELLINGS[family]
        config = {
            words.get(name, name): value
            for name, value in rest.items()
            if value is not None and name not in WITHOUT_MEANING
        }
        return cls(family, config, client, retry, None if profile is None else str(profile))

    def connect(self, bucket: str) -> Any:
        """Obstore's store of ``bucket``. Nothing is asked of the network yet.

        Raises:
            quire.SourceError: obstore does not know an option, or a profile needs boto3.
        """
        from obstore import store
        from obstore.exceptions import UnknownConfigurationKeyError

        given: dict[str, Any] = {
            "config": self.config,
            "client_options": self._client_options(),
            "retry_config": self.retry.as_obstore(),
        }
        try:
            if self.family == "gs":
                return store.GCSStore(bucket, **given)
            if self.family == "az":
                return _azure(store, bucket, given)
            provider = self._profile_credentials()
            if provider is not None:
                given["credential_provider"] = provider
            return store.S3Store(bucket, **given)
        except UnknownConfigurationKeyError as error:
            said = str(error).partition("\n")[0]
            raise SourceError(
                f"{said} See obstore's {self.family} options for the names it takes in "
                "storage_options"
            ) from error

    def _client_options(self) -> dict[str, object]:
        endpoints = [value for name, value in self.config.items() if ENDPOINT.search(name)]
        endpoints += [os.environ.get(name) for name in ENDPOINT_VARIABLES[self.family]]
        is_plain = any(str(endpoint).startswith("http://") for endpoint in endpoints)
        spelled_out = {"allow_http": True} if is_plain else {}
        return {"user_agent": "quire", **spelled_out, **_durations(self.client)}

    def _profile_credentials(self) -> Any:
        """boto3's credentials of a profile, or None where none is wanted."""
        wanted = self.profile or os.environ.get("AWS_PROFILE")
        own = {"access_key_id", "skip_signature", "secret_access_key"} & self.config.keys()
        if self.profile is None and (own or "AWS_ACCESS_KEY_ID" in os.environ):
            return None
        if wanted is None:
            return None
        try:
            import boto3
            from obstore.auth.boto3 import Boto3CredentialProvider
        except ImportError as error:
            raise SourceError(
                f"the AWS profile {wanted!r} is read by boto3, which is not installed: run "
                "`pip install boto3`, or pass access_key_id and secret_access_key"
            ) from error
        try:
            session = boto3.Session(profile_name=wanted)
            if "region" not in self.config and session.region_name:
                self.config["region"] = session.region_name
            return Boto3CredentialProvider(session)
        except Exception as error:
            raise SourceError(
                f"the AWS profile {wanted!r} cannot be used: {error}; check ~/.aws/config"
            ) from error


def _dict_of(options: dict[str, object], name: str) -> dict[str, object]:
    """Takes the nested dict ``name`` out of ``options``."""
    value = options.pop(name, None) or {}
    if not isinstance(value, Mapping):
        raise SourceError(f"storage_options {name}={value!r} must be a dict")
    return dict(value)


def _durations(client: Mapping[str, object]) -> dict[str, object]:
    """Client options with durations given as numbers put into obstore's words."""
    return {
        name: f"{int(value * 1000)}ms"
        if name.endswith("timeout") and isinstance(value, int | float)
        else value
        for name, value in client.items()
    }


def _take_google_token(rest: dict[str, object]) -> None:
    """Gcsfs' ``token``: "anon", a file, or the key itself as a dict."""
    token = rest.pop("token", None)
    if token == ANONYMOUS:
        rest["skip_signature"] = True
    elif isinstance(token, Mapping):
        rest["service_account_key"] = json.dumps(dict(token))
    elif isinstance(token, str) and token not in ("google_default", "cloud", "cache", "browser"):
        rest["application_credentials"] = token


def _take_azure_strings(rest: dict[str, object]) -> None:
    """Adlfs' ``connection_string`` and ``credential``."""
    text = rest.pop("connection_string", None)
    for part in str(text or "").split(";"):
        name, _, value = part.partition("=")
        if name in CONNECTION_STRING:
            rest.setdefault(CONNECTION_STRING[name], value)
    credential = rest.pop("credential", None)
    if isinstance(credential, str):
        is_sas = "sig=" in credential
        rest.setdefault("sas_key" if is_sas else "account_key", credential)


def _azure(store: Any, bucket: str, given: dict[str, Any]) -> Any:
    """``container`` or ``container@account.dfs.core.windows.net`` of an abfs URL."""
    container, _, host = bucket.partition("@")
    account = host.partition(".")[0]
    if account and "account_name" not in given["config"]:
        given["config"] = {**given["config"], "account_name": account}
    return store.AzureStore(container, **given)
