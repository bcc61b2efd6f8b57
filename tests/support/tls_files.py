"""Certificates for tests, made by the `openssl` program and signed by one authority of their own."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from snowskin.transport.tcp.settings import TlsFiles

if TYPE_CHECKING:
    from pathlib import Path

KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]


class Authority:
    """Signs; `folder` holds its files and those that it signed."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        """Makes the authority; skips the test where there is no `openssl`."""
        if shutil.which("openssl") is None:
            pytest.skip("NOT TESTED: TLS, THERE IS NO openssl PROGRAM TO MAKE CERTIFICATES WITH")
        self._folder = folder
        self.certificate = str(folder / f"{name}.pem")
        self._key = str(folder / f"{name}.key")
        self._make("-keyout", self._key, "-out", self.certificate, "-subj", f"/CN={name}")

    def sign(self, name: str, *, names: str = "IP:127.0.0.1", authority: str = "") -> TlsFiles:
        """Files of one side, valid for `names` (`IP:…,DNS:…`); `authority` whom it believes, this one if empty."""
        certificate, key = (str(self._folder / f"{name}.{end}") for end in ("pem", "key"))
        self._make(
            *("-CA", self.certificate, "-CAkey", self._key, "-keyout", key, "-out", certificate),
            *("-subj", f"/CN={name}", "-addext", f"subjectAltName={names}"),
            *("-addext", "basicConstraints=critical,CA:FALSE"),
        )
        return TlsFiles(certificate=certificate, key=key, authority=authority or self.certificate)

    def _make(self, *arguments: str) -> None:
        subprocess.run(
            ["openssl", "req", "-x509", *KEY, *arguments],
            check=True,
            capture_output=True,
            timeout=30,
        )
