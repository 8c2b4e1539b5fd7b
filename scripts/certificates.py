"""Certificates for development: `python scripts/certificates.py certs` (`make certs`) writes PEM files into a directory.

    ca.crt, ca.key                the authority of the parts: what they show each other comes from it
    encoder.crt, encoder.key ...  of each part, as a server and as a client, for its own name, localhost and 127.0.0.1
    clients-ca.crt, .key          another authority, for those who call the gateway: a client's certificate opens no stage
    client.crt, client.key        of a client; its common name, `client`, can stand for an API key

Run again, it keeps the authorities and renews the rest. In production certificates come from cert-manager or the like.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PARTS = ("encoder", "pose", "denoiser", "vae", "gateway")
_AUTHORITY_DAYS = 3650
_CLOCKS_DIFFER_BY = timedelta(hours=1)
_SERVER, _CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH


@dataclass(frozen=True)
class Authority:
    """A certificate that signs others, and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def at(cls, path: Path, name: str) -> Authority:
        """The authority whose files are `path` with .crt and .key; made where there is none."""
        files = path.with_suffix(".crt"), path.with_suffix(".key")
        if all(file.exists() for file in files):
            key = serialization.load_pem_private_key(files[1].read_bytes(), None)
            assert isinstance(key, ec.EllipticCurvePrivateKey)
            return cls(x509.load_pem_x509_certificate(files[0].read_bytes()), key)
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(name, key, _AUTHORITY_DAYS).issuer_name(_named(name))
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_key_usage(signs_certificates=True), critical=True)
        authority = cls(builder.sign(key, hashes.SHA256()), key)
        _write(path, authority.certificate, key)
        return authority

    def sign(self, path: Path, name: str, hosts: Sequence[str], *, server: bool = False, days: int = 365) -> None:
        """Writes a certificate and its key.

        Args:
            path: of the files, without .crt and .key.
            name: common name.
            hosts: DNS names and addresses that it is for.
            server: it may be shown by a server, and not by clients only.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(name, key, days).issuer_name(self.certificate.subject)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_key_usage(signs_certificates=False), critical=True)
        usage = x509.ExtendedKeyUsage([_SERVER, _CLIENT] if server else [_CLIENT])
        builder = builder.add_extension(usage, critical=False)
        of_authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        builder = builder.add_extension(of_authority, critical=False)
        if hosts:
            names = x509.SubjectAlternativeName([_alternative(host) for host in hosts])
            builder = builder.add_extension(names, critical=False)
        _write(path, builder.sign(self.key, hashes.SHA256()), key)


def write_certificates(directory: Path, hosts: Sequence[str] = (), days: int = 365) -> None:
    """Writes the files that the top of this file names.

    Args:
        hosts: that each part can be reached as, beside its own name, localhost and this machine's own addresses.
        days: that the certificates of the parts and of the client are valid for.
    """
    directory.mkdir(parents=True, exist_ok=True)
    parts = Authority.at(directory / "ca", "bunraku parts")
    clients = Authority.at(directory / "clients-ca", "bunraku clients")
    for part in PARTS:
        parts.sign(directory / part, part, [part, "localhost", "127.0.0.1", "::1", *hosts], server=True, days=days)
    clients.sign(directory / "client", "client", [], days=days)


def _builder(name: str, key: ec.EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
    now, public = datetime.now(UTC), key.public_key()
    builder = x509.CertificateBuilder().subject_name(_named(name)).public_key(public)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - _CLOCKS_DIFFER_BY).not_valid_after(now + timedelta(days=days))
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write(path: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _replace(path.with_suffix(".key"), text, 0o600)
    _replace(path.with_suffix(".crt"), certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def _replace(path: Path, content: bytes, mode: int) -> None:
    """A file that is there either as it was or as it is to be: servers read it while it is renewed."""
    part = path.with_suffix(path.suffix + ".part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
    part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes certificates for development.")
    parser.add_argument("directory", type=Path, help="where to")
    parser.add_argument("--host", action="append", default=[], help="name or address that the parts are reached as")
    parser.add_argument("--days", type=int, default=365, help="that they are valid for")
    options = parser.parse_args()
    write_certificates(options.directory, options.host, options.days)
    print(f"certificates are in {options.directory}; their keys and those of the authorities too: keep them")


if __name__ == "__main__":
    main()
