"""Certificates of one side of a connection, and what gRPC makes of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import grpc


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of a program; its own certificate goes with its key.

    Attributes:
        ca: certificates of the authorities that the other side's certificate must come from; None: those that gRPC
            ships for a channel, and no certificate is asked for by a server.
        certificate: the program's own, followed by those between it and the authority; None: it shows none.
        key: private key of the certificate.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("a TLS certificate needs its key, and a key its certificate")

    @classmethod
    def of_environment(cls) -> Self:
        """As BUNRAKU_TLS_CA, BUNRAKU_TLS_CERTIFICATE and BUNRAKU_TLS_KEY name them."""
        named = (os.environ.get(f"BUNRAKU_TLS_{name}") for name in ("CA", "CERTIFICATE", "KEY"))
        return cls(*(Path(name) if name else None for name in named))

    def __bool__(self) -> bool:
        return any((self.ca, self.certificate))

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For a channel: checks the server's certificate, shows the program's own. Raises OSError."""
        return grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.certificate))

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a port; with `ca`, a client without a certificate of that authority is refused.

        The files are read again for every connection that is made after they have changed, so that certificates can
        be renewed without a restart.

        Raises:
            OSError: a file cannot be read.
            ValueError: there is no certificate.
        """
        if self.certificate is None:
            raise ValueError("a server needs a TLS certificate and its key")
        latest = self._times()
        initial = self._configuration()

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal latest
            try:
                times = self._times()
                if times == latest:
                    return None
                configuration = self._configuration()
            except OSError:  # in the middle of being replaced: the next connection looks again
                return None
            latest = times
            return configuration

        required = self.ca is not None
        return grpc.dynamic_ssl_server_credentials(initial, renewed, required)  # type: ignore[arg-type]  # None: unchanged

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        pair = (_read(self.key) or b"", _read(self.certificate) or b"")
        return grpc.ssl_server_certificate_configuration([pair], _read(self.ca))

    def _times(self) -> list[int]:
        return [path.stat().st_mtime_ns for path in (self.ca, self.certificate, self.key) if path is not None]


NO_TLS = TlsFiles()


def _read(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()
