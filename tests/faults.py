"""Places where nobody can be reached, and certificates that nobody should trust: what a fake server cannot be."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest


@contextmanager
def black_hole() -> Iterator[int]:
    """A port whose queue is full: who connects hears nothing."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", port))
        with socket.socket() as probe:
            probe.settimeout(0.2)
            try:
                probe.connect(("127.0.0.1", port))
            except TimeoutError:
                pass
            else:
                pytest.skip("this system takes connections beyond its queue")
        yield port


class Authority:
    """Signs server certificates; `trusting()` is a client's context that believes it, and nobody else."""

    def __init__(self, folder: Path) -> None:
        pytest.importorskip("cryptography", reason="no library here that makes certificates")
        self._folder = folder
        self._key, self._certificate = self._made("Lightrail tests", None)
        self._root = folder / "root.pem"
        self._root.write_bytes(self._certificate)

    def trusting(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self._root)
        return context

    def server(self, *, name: str = "127.0.0.1", days: int = 1, trusted: bool = True) -> ssl.SSLContext:
        """A server's context. `days` it is valid from now on; fewer than none have passed since it was."""
        key, certificate = self._made(name, self if trusted else None, days)
        pair = self._folder / f"{name}-{days}-{trusted}.pem"
        pair.write_bytes(key + certificate)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair)
        context.set_alpn_protocols(["h2", "http/1.1"])
        return context

    def _made(self, name: str, issuer: Authority | None, days: int = 1) -> tuple[bytes, bytes]:
        """Key and certificate as PEM; self-signed where there is no issuer."""
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        signing, by = key, subject
        if issuer is not None:
            loaded = serialization.load_pem_private_key(issuer._key, None)
            assert isinstance(loaded, ec.EllipticCurvePrivateKey)
            signing, by = loaded, x509.load_pem_x509_certificate(issuer._certificate).subject
        try:
            alternative: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(name))
        except ValueError:
            alternative = x509.DNSName("elsewhere.test")
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(by)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=10))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
            .sign(signing, hashes.SHA256())
        )
        encoding = serialization.Encoding.PEM
        plain = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return plain, certificate.public_bytes(encoding)
