"""A network device that holds back every packet for a time, as a long way does.

    sudo python benchmarks/slow_link.py DEVICE SECONDS

What is routed to the device comes back from it so much later. It lasts as long as this process. (`tc` can do
the same where the kernel has netem.)
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

_SET_INTERFACE = 0x400454CA  # TUNSETIFF
_PLAIN_PACKETS = 0x1001  # IFF_TUN | IFF_NO_PI
_LARGEST_PACKET = 1 << 16


def hold_back(device: str, seconds: float) -> None:
    """For ever."""
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, _SET_INTERFACE, struct.pack("16sH22x", device.encode(), _PLAIN_PACKETS))
    print(f"{device} is there", flush=True)
    held: deque[tuple[float, bytes]] = deque()
    now_s = time.monotonic
    while True:
        select.select([tun], [], [], max(0.0, held[0][0] - now_s()) if held else None)
        try:
            while True:
                packet = os.read(tun, _LARGEST_PACKET)
                held.append((now_s() + seconds, packet))
        except BlockingIOError:
            pass
        except OSError:  # until it has been set up
            time.sleep(0.01)
        while held and held[0][0] <= now_s():
            os.write(tun, held.popleft()[1])


if __name__ == "__main__":
    hold_back(sys.argv[1], float(sys.argv[2]))
