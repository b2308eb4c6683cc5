"""Texts without secrets: what goes into logs, runs, manifests and error files passes through here."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

# Names of environment variables that hold secrets, such as MLFLOW_TRACKING_PASSWORD and AWS_SECRET_ACCESS_KEY;
# PPC_NOTIFY is the address of a webhook, which whoever knows it can write to.
SECRET = re.compile(r"PASSWORD|PASSWD|SECRET|TOKEN|ACCESS_KEY|CREDENTIAL|PPC_NOTIFY", re.IGNORECASE)
HIDDEN = "***"
# For `console.print` of a line with names and paths in it: no colours, brackets are no tags, and it can be copied.
AS_IT_IS: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}
SHORTEST = 4  # characters: shorter values are words such as `1`, and replacing them would garble texts
_LOGIN = re.compile(r"(?<=://)[^\s/?#'\"<>]+@")
# As database drivers take them; odbc_connect is a whole connection string, password included.
_IN_QUERY = re.compile(r"([?&](?:password|passwd|pwd|token|secret|odbc_connect)=)[^\s&#'\"<>]+", re.IGNORECASE)


def safe_uri(uri: str) -> str:
    """The URI without user and password, fit for files and messages."""
    uri = _IN_QUERY.sub(rf"\1{HIDDEN}", uri)
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


def without_secrets(text: str, environ: Mapping[str, str] | None = None) -> str:
    """The text with the values of secret environment variables, and logins in URIs, replaced by `***`."""
    values = {
        value
        for name, value in (os.environ if environ is None else environ).items()
        if SECRET.search(name) and len(value) >= SHORTEST
    }
    for value in sorted(values | {quote(value, safe="") for value in values}, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return _IN_QUERY.sub(rf"\1{HIDDEN}", _LOGIN.sub(f"{HIDDEN}@", text))
