"""Settings of the data plane that nodes and engines share: how its connections prove who they are.

Rules kept here: TLS is whole or absent: certificate, key and authority together, on both sides, or on none.
"""

from __future__ import annotations

from dataclasses import dataclass

from snowskin.kvstore.config import setting
from snowskin.kvstore.errors import BadSetting
from snowskin.kvstore.role import RoleSettings
from snowskin.transport.tcp_settings import TlsFiles


@dataclass(frozen=True, kw_only=True)
class DataSettings(RoleSettings):
    """Of a role that moves blocks between hosts."""

    data_tls_certificate: str = setting(
        "", help="PEM file: this side's certificate on the data plane, for mutual TLS."
    )
    data_tls_key: str = setting("", help="PEM file: the key of that certificate.")
    data_tls_authority: str = setting(
        "", help="PEM file: who must have signed the other side's certificate."
    )

    def __post_init__(self) -> None:
        """Refuses half of it."""
        super().__post_init__()
        self.tls_files()

    def tls_files(self) -> TlsFiles | None:
        """What the transport wants to know; None where it goes without TLS."""
        files = (self.data_tls_certificate, self.data_tls_key, self.data_tls_authority)
        if not any(files):
            return None
        if not all(files):
            raise BadSetting(
                f"of the data plane's TLS files {sum(map(bool, files))} of 3 are given",
                hint="give data_tls_certificate, data_tls_key and data_tls_authority, or none",
            )
        certificate, key, authority = files
        return TlsFiles(certificate=certificate, key=key, authority=authority)
