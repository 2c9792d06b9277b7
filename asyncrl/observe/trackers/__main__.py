"""The process of one tracker: `python -m asyncrl.observe.trackers`.

Its standard input has a `Start` in one line; the end of that input means that the run has ended. Standard
output and error are a log, whose last line says what has gone wrong if the process fails.
"""

from __future__ import annotations

import select
import signal
import sys
import traceback

import msgspec

from asyncrl.observe.trackers.follow import Following
from asyncrl.observe.trackers.start import Start, marks_of
from asyncrl.resolve import forget_own_path, resolve

POLL_S = 1.0


def main() -> int:
    forget_own_path()
    # A cluster asks all processes of a job to end: the run does, and this one when it has brought the rest.
    signal.signal(signal.SIGTERM, lambda *_: None)
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=Start)
    try:
        tracker = resolve(start.factory, what="observe.trackers")(start.run)
        following = Following(start.run.folder, marks_of(start.run.folder, start.tracker), tracker)
        has_ended = False
        while True:
            has_ended = has_ended or bool(select.select([sys.stdin], [], [], POLL_S)[0])
            while following.poll():
                pass
            if has_ended:
                break
        tracker.close()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told
        traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
