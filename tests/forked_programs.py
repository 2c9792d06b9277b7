"""Our commands as programs that a shell finds, each forked from the process that has imported what they
need."""

import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import forked_command
from forked_server import fork

COMMANDS = {"asyncrl": "asyncrl.cli.main", "asyncrl-launch": "asyncrl.cli.launch"}
PROGRAM = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as forker:
    forker.connect({address!r})
    words = [os.getcwd(), {module!r}, *sys.argv[1:]]
    socket.send_fds(forker, [json.dumps([words, dict(os.environ)]).encode()], [0, 1, 2])
    sys.exit(int(forker.recv(16) or 1))
"""


@contextmanager
def programs(folder: Path) -> Iterator[None]:
    """In `folder`, for so long; one is carried out at a time. Where nothing can be forked, they are
    themselves."""
    if sys.platform != "linux":
        for name in COMMANDS:
            (folder / name).symlink_to(Path(sys.executable).with_name(name))
        yield
        return
    address = f"\0asyncrl-programs-{os.getpid()}"
    for name, module in COMMANDS.items():
        (folder / name).write_text(PROGRAM.format(python=sys.executable, address=address, module=module))
        (folder / name).chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        carrying_out = threading.Thread(target=_carry_out, args=[listener])
        carrying_out.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            carrying_out.join()


def _carry_out(listener: socket.socket) -> None:
    with suppress(OSError):  # it was shut down
        while True:
            program, _ = listener.accept()
            with program:
                message, files, *_ = socket.recv_fds(program, 1 << 20, 3)
                words, environment = json.loads(message)
                process = fork(__name__, words, tuple(files), environment)
                for file in files:
                    os.close(file)
                program.send(str(process.wait()).encode())


def main(arguments: list[str]) -> int:
    """In the forked process. arguments: its folder, the command's module, and its own arguments."""
    os.chdir(arguments[0])
    return forked_command.main(arguments[1:])
