"""Good tars of every format, for tests to damage."""

from __future__ import annotations

import io
import tarfile

from PIL import Image


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (value, 1, 2)).save(file, "PNG")
    return file.getvalue()


def tars() -> list[bytes]:
    found = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as tar:
            for i, kind in enumerate([tarfile.REGTYPE] * 4 + [tarfile.SYMTYPE, tarfile.FIFOTYPE]):
                name = f"{i}.png" if form == tarfile.USTAR_FORMAT or i % 2 else f"{'long é/' * 30}{i}.png"
                member = tarfile.TarInfo(name)
                member.type = kind
                member.size = len(png(i)) if kind == tarfile.REGTYPE else 0
                tar.addfile(member, io.BytesIO(png(i)))
        found.append(file.getvalue())
    sparse = tarfile.TarInfo("sparse.png")
    sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "2000"}
    sparse.size = 1024
    found.append(sparse.tobuf(tarfile.PAX_FORMAT) + b"1\n0\n512\n".ljust(1024, b"\0") + found[0])
    return found
