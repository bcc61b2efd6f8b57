"""Settings of the data plane that nodes and engines share: how its connections prove who they are, and where UCX goes.

Rules kept here: TLS is whole or absent: certificate, key and authority together, on both sides, or on none. UCX, which
opens ports of its own, listens on the loopback interface where its role does, and beyond it only with `--insecure`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from snowskin.kvstore.config import setting
from snowskin.kvstore.errors import BadSetting, InsecureAddress
from snowskin.kvstore.role import RoleSettings
from snowskin.transport.routes import is_loopback
from snowskin.transport.tcp.settings import TlsFiles
from snowskin.transport.ucx.settings import UcxSettings

LOOPBACK_DEVICE = "lo"


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

    ucx_net_devices: str = setting(
        "",
        help="Interfaces that UCX uses and listens on, e.g. mlx5_0:1 or eth0,eth1; if empty, lo where the role "
        "listens on loopback, else all.",
    )
    ucx_tls: str = setting(
        "", help="Transports of UCX, e.g. rc,cuda_copy,cuda_ipc; it chooses itself if empty."
    )
    trusted_network: bool = setting(
        False,
        help="Let UCX reach memory one-sidedly over any network: then whoever can connect reads this process's memory.",
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

    def ucx_devices(self, host: str) -> str:
        """Interfaces by comma; empty: all. `host` is where the role listens.

        UCX's own variable comes first, as it does for UCX.
        """
        told = os.environ.get("UCX_NET_DEVICES", "") or self.ucx_net_devices
        return told or (LOOPBACK_DEVICE if is_loopback(host) else "")

    def ucx_stays_here(self, host: str) -> bool:
        """Whether UCX listens on this host's loopback alone."""
        return self.ucx_devices(host) == LOOPBACK_DEVICE

    def check_ucx(self, host: str) -> None:
        """Refuses to listen beyond loopback, unless told so plainly.

        Raises:
            InsecureAddress: and `insecure` is false.
        """
        if not (self.insecure or self.ucx_stays_here(host)):
            raise InsecureAddress(
                f"ucx would listen on {self.ucx_devices(host) or 'all interfaces'}, and its ports have no credentials",
                hint="give --ucx-net-devices lo (and no UCX_NET_DEVICES), or allow it with --insecure",
            )

    def ucx_settings(self, host: str) -> UcxSettings:
        """How a process that listens on `host` opens UCX."""
        return UcxSettings(
            net_devices=self.ucx_devices(host),
            tls=self.ucx_tls,
            trusted_network=self.trusted_network,
        )
