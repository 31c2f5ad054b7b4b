"""The certificate with which a server speaks TLS, and its key: loaded, or what is wrong with them.

OpenSSL refuses both at once, in words of its own code. Its formats: PEM (RFC 7468), the server's
own certificate first, then those that vouch for it.
"""

from __future__ import annotations

import ssl

from xs.errors import Usage

# How a label ends: there are TRUSTED certificates, and keys of a kind.
_CERTIFICATE, _KEY = "CERTIFICATE-----", "PRIVATE KEY-----"
_ENCRYPTED = ("BEGIN ENCRYPTED PRIVATE KEY", "Proc-Type: 4,ENCRYPTED")  # PKCS #8; RFC 1421 §4.6.1.1
_OF_ANOTHER = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")
_UNTOLD = "PEM lib"  # what is said of a file in the place of a reason


def server_context(certificate: str, key: str | None) -> ssl.SSLContext:
    """What gives a connection TLS; `key` is a file, or None. Raises `Usage`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    # A client that goes without TLS's goodbye is nothing special: a request says where it ends.
    context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)  # since OpenSSL 3
    context.set_alpn_protocols(["http/1.1"])
    try:
        # A key with a passphrase would have OpenSSL ask for it at the terminal.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
        _check_certificate(certificate)
        _check_key(certificate, key, reason)
        reason = str(reason).replace("_", " ").lower()
        raise _unusable("cert", certificate, f"OpenSSL refuses it: {reason}") from None
    return context


def _check_certificate(path: str) -> None:
    text = _read("cert", path)
    if _CERTIFICATE not in text:
        raise _unusable(
            "cert", path, f"it has no certificate in PEM: no line -----BEGIN {_CERTIFICATE}"
        )
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (OSError, ValueError):
        raise _unusable("cert", path, "a certificate in it is damaged: get it anew") from None


def _check_key(certificate: str, path: str | None, reason: str) -> None:
    """What is wrong with a key that was refused for that reason; the certificate is whole."""
    text = _read("key", certificate if path is None else path)
    if path is None and _KEY not in text:
        raise _unusable(
            "cert", certificate, "it has no key in it: give the key's file as --tls-key"
        )
    option, path = ("cert", certificate) if path is None else ("key", path)
    if _KEY not in text:
        raise _unusable(option, path, f"it has no key in PEM: no line -----BEGIN {_KEY}")
    if any(mark in text for mark in _ENCRYPTED):
        without = f"openssl pkey -in {path} -out FILE makes one without"
        raise _unusable(option, path, f"the key has a passphrase, and nobody is asked: {without}")
    if reason in _OF_ANOTHER:
        of = f"the first certificate of {certificate}, which is to be the server's own"
        raise _unusable(option, path, f"the key is not that of {of}")
    if _UNTOLD in reason:
        raise _unusable(option, path, "the key in it is damaged: get it anew")


def _read(option: str, path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read().decode("ascii", "ignore")
    except (OSError, ValueError) as error:
        raise _unusable(option, path, getattr(error, "strerror", None) or str(error)) from None


def _unusable(option: str, path: str, why: str) -> Usage:
    return Usage(f"can't use --tls-{option} {path or repr(path)}: {why}")
