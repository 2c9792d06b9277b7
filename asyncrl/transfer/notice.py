"""What the trainer's end tells of a version, and who is on the same host."""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path

import msgspec

from asyncrl.weights.manifest import WeightNotice
from asyncrl.weights.shm.segment import shared_folder
from asyncrl.wire import messages as m


class TcpNotice(msgspec.Struct, frozen=True):
    here: WeightNotice
    """For those on the trainer's host."""
    host: str
    source: m.Peer
    """For all others."""
    identity: str

    @property
    def whole(self) -> m.PieceId:
        return m.PieceId(self.here.version, self.identity, is_delta=False)


def identity(notice: WeightNotice) -> str:
    """Tells a version by its number and content."""
    numbers = (notice.version, *notice.checksums)
    return hashlib.blake2b(b"".join(n.to_bytes(8, "little") for n in numbers), digest_size=16).hexdigest()


def this_host() -> str:
    """The same for processes that share memory through files, and for no others: containers of one machine
    are apart where they see another `/dev/shm`."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    machine = boot.read_text().strip() if boot.exists() else str(uuid.getnode())
    return hashlib.blake2b(f"{machine} {shared_folder().stat().st_dev}".encode(), digest_size=6).hexdigest()
