"""What a hostile program tries: each attempt is bounded, and leaves nothing behind."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from launched import command
from reward_pools import is_running, until

from asyncrl import scratch
from asyncrl.reward.sandbox import confine, sandbox
from asyncrl.reward.sandbox.limits import Limits, SandboxError
from asyncrl.reward.sandbox.sandbox import run_program
from asyncrl.reward.sandbox.seccomp import AUDIT_ARCH, allowed_calls

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def nothing_left(tmp_path, monkeypatch):
    """No folder, and (see `conftest`) no process."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert list(tmp_path.glob(f"{scratch.PREFIX}*")) == []


def refused(outcome, error="PermissionError"):
    assert outcome.status == "error", outcome
    assert error in outcome.stderr.splitlines()[-1], outcome.stderr
    return True


def test_a_program_reads_its_input_and_says_its_answer():
    outcome = run_program("import sys\nfor line in sys.stdin: print(int(line) ** 2)", "3\n4\n")
    assert (outcome.status, outcome.stdout, outcome.stderr) == ("ok", "9\n16\n", "")


def test_what_contest_programs_do_works():
    outcome = run_program(
        "import asyncio, collections, json, math, random, re, tempfile, threading\n"
        "threading.stack_size(1 << 26)\n"
        "thread = threading.Thread(target=lambda: print('thread'))\n"
        "thread.start(); thread.join()\n"
        "async def main(): await asyncio.sleep(0.01); print('loop')\n"
        "asyncio.run(main())\n"
        "with tempfile.TemporaryFile('w+') as file:\n"
        "    file.write('file'); file.seek(0); print(file.read())\n"
        "with open('note', 'w') as file: print('kept', file=file)\n"
        "print(open('note').read(), end='')\n"
        "exit()\n"
    )
    assert (outcome.status, outcome.stdout) == ("ok", "thread\nloop\nfile\nkept\n"), outcome


def test_numpy_works():
    outcome = run_program("import numpy as np; print((np.ones((50, 50)) @ np.ones((50, 50))).sum())")
    assert (outcome.status, outcome.stdout) == ("ok", "125000.0\n"), outcome


def test_the_same_program_says_the_same():
    program = "print(*{str(i) for i in range(1000)})"
    assert run_program(program).stdout == run_program(program).stdout


@pytest.mark.parametrize(
    ("program", "status", "how"),
    [
        ("raise SystemExit(3)", "error", "exit status 3"),
        ("import os; os.abort()", "error", "killed by SIG"),
        ("1 +", "error", "exit status 1"),
        ("import os; os._exit(0)", "ok", "exit status 0"),
    ],
)
def test_it_is_told_how_a_program_ended(program, status, how):
    outcome = run_program(program)
    assert outcome.status == status
    assert how in outcome.how


@pytest.mark.parametrize(
    ("program", "limits", "how"),
    [
        ("while True: pass", Limits(cpu_s=1), "more than 1 s of CPU time"),
        (
            "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
            Limits(cpu_s=1),
            "more than 1 s of CPU time",
        ),
        ("import time; time.sleep(3600)", Limits(idle_s=0.5), "more than 0.5 s of idling"),
        (
            "import os, time\nfor fd in (0, 1, 2): os.close(fd)\ntime.sleep(3600)",
            Limits(idle_s=0.5),
            "more than 0.5 s of idling",
        ),
        ("while True: print('x' * 1000)", Limits(), "bytes of output"),
        (
            "import threading, time\nthreading.stack_size(1 << 15)\n"
            "while True: threading.Thread(target=time.sleep, args=(3600,)).start()",
            Limits(),
            "more than 32 threads",
        ),
        (
            "from itertools import count\nfor i in count():\n"
            "    try: open(str(i % 90), 'w').write('x' * (1 << 20))\n"
            "    except OSError: pass",
            Limits(),
            "bytes of files",
        ),
        ("from itertools import count\nfor i in count(): open(str(i), 'w')", Limits(), "more than 100 files"),
    ],
    ids=["spins", "spins on", "sleeps", "sleeps behind closed pipes", "prints", "threads", "bytes", "files"],
)
def test_a_program_without_end_is_ended(program, limits, how):
    outcome = run_program(program, limits=limits)
    assert outcome.status == "limit"
    assert how in outcome.how
    assert len(outcome.stdout) <= limits.output_bytes


@pytest.mark.slow
def test_a_busy_machine_makes_no_answer_wrong():
    """A program that runs, or would if it were let, is not idle: not with one core in ten, nor with none."""
    spin = "import time\nwhile time.process_time() < 0.5: pass\nprint('done')"
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(8)]
    try:
        outcome = run_program(spin, limits=Limits(idle_s=0.8))  # on two cores it waits for longer
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert (outcome.status, outcome.stdout) == ("ok", "done\n"), outcome


def test_threads_that_have_ended_have_worked_as_well():
    program = (
        "import threading, time\n"
        "def work():\n    end = time.thread_time() + 0.2\n    while time.thread_time() < end: pass\n"
        "for _ in range(6):\n    t = threading.Thread(target=work); t.start(); t.join()\n"
        "print('done')"
    )
    outcome = run_program(program, limits=Limits(idle_s=0.8))
    assert (outcome.status, outcome.stdout) == ("ok", "done\n"), outcome


def test_a_flood_of_errors_is_ended_and_takes_no_memory():
    before = psutil.Process().memory_info().rss
    outcome = run_program("import sys\nwhile True: sys.stderr.write('x' * 100_000)")
    assert outcome.status == "limit"
    assert "bytes of output" in outcome.how
    assert len(outcome.stderr) <= 4096
    assert psutil.Process().memory_info().rss - before < 64 << 20


def test_memory_is_bounded():
    assert refused(run_program("x = []\nwhile True: x.append(bytes(10 ** 7))"), "MemoryError")


def test_a_file_is_bounded():
    outcome = run_program("with open('f', 'wb') as f:\n    while True: f.write(bytes(10 ** 6))")
    assert refused(outcome, "File too large")


@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True: os.fork()",
        "import os\npid = os.fork()\nif pid == 0:\n    os.setsid()\n    os.fork()\n    while True: pass",
        "import subprocess; subprocess.Popen(['sleep', '3600'], start_new_session=True)",
        "import os, sys; os.posix_spawn(sys.executable, [sys.executable, '-c', 'while 1: 1'], {})",
        "import multiprocessing; multiprocessing.Process(target=print).start()",
        "import os; os.setsid()",
    ],
    ids=["fork bomb", "daemon", "subprocess", "spawn", "multiprocessing", "setsid"],
)
def test_there_is_no_second_process(program):
    assert refused(run_program(program))


def test_processes_outside_are_out_of_reach():
    bystander = subprocess.Popen(["sleep", "3600"])
    try:
        for program in (
            f"import os; os.kill({bystander.pid}, 9)",
            "import os; os.kill(os.getppid(), 15)",
            "import os; os.kill(0, 9)",
            "import os; os.kill(-1, 9)",
            f"import signal; signal.pidfd_send_signal({bystander.pid}, 9)",
            f"import resource; resource.prlimit({bystander.pid}, resource.RLIMIT_CPU, (1, 1))",
            f"import os; os.setpriority(os.PRIO_PROCESS, {bystander.pid}, 19)",
            "import os, fcntl; r, w = os.pipe(); "
            f"fcntl.fcntl(r, fcntl.F_SETOWN, {bystander.pid})",  # the kernel would send the signal
        ):
            assert refused(run_program(program)), program
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK"])
def test_there_is_no_network(family):
    assert refused(run_program(f"import socket; socket.socket(socket.{family})"))


def test_nobody_is_called():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        port = listener.getsockname()[1]
        call = f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)"
        assert subprocess.run([sys.executable, "-c", call], check=False).returncode == 0  # as it would
        listener.accept()[0].close()
        assert refused(run_program(call))
        with pytest.raises(TimeoutError):
            listener.accept()


def test_a_datagram_goes_to_its_pair_and_nowhere_else():
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind("")  # the kernel chooses an abstract name, which no rule for files concerns
        pair = "import socket; a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        assert run_program(f"{pair}a.send(b'x'); print(b.recv(9))").stdout == "b'x'\n"
        assert refused(run_program(f"{pair}a.sendto(b'x', {other.getsockname()!r})"))
        with pytest.raises(BlockingIOError):
            other.recv(9, socket.MSG_DONTWAIT)


def test_the_environment_and_the_descriptors_of_the_parent_stay_with_it(monkeypatch, tmp_path):
    monkeypatch.setenv("API_KEY", "secret of the run")
    secret = tmp_path / "secret"
    secret.write_text("secret of the run")
    with secret.open() as file:
        os.set_inheritable(file.fileno(), True)
        outcome = run_program(
            "import os\nprint(sorted(os.environ))\n"
            "for fd in range(3, 32):\n    try: os.fstat(fd)\n    except OSError: continue\n    print(fd)"
        )
    assert outcome.status == "ok", outcome
    environment, *descriptors = outcome.stdout.splitlines()
    assert "API_KEY" not in environment
    assert descriptors == []
    assert refused(run_program(f"print(open('/proc/{os.getpid()}/environ').read())"))


def test_no_file_of_the_machine_is_read_or_changed(tmp_path):
    """The run's keys are its user's own, and so is the program: the mode of the file would not help."""
    keys = tmp_path / ".keys"
    keys.write_text("secret of the run")
    keys.chmod(0o600)
    before = keys.stat()
    for attempt in (
        "open(path).read()",
        "open(path, 'w')",
        "open(path, 'a')",
        "os.truncate(path, 0)",
        "os.open(path, os.O_RDONLY | os.O_TRUNC)",
        "os.unlink(path)",
        "os.rename(path, 'mine')",
        "os.link(path, 'mine')",
        "os.symlink(path, 'mine')",
        "os.chmod(path, 0o777)",
        "os.chown(path, 1, 1)",
        "os.utime(path, (0, 0))",
        "os.setxattr(path, 'user.x', b'x')",
        "os.listdir(os.path.dirname(path))",
        "open(os.path.dirname(path) + '/new', 'w')",
        "os.mkdir('folder')",
        "os.mkfifo('pipe')",
        "os.execv('/bin/cat', ['cat', path])",
        "os.mount('none', '/', 'tmpfs')" if hasattr(os, "mount") else "os.chroot('/')",
        "os.open('/dev/shm/x', os.O_CREAT | os.O_WRONLY)",
        "open('/proc/self/environ').read()",
        "open('/etc/passwd').read()",
    ):
        outcome = run_program(f"import os\npath = {str(keys)!r}\n{attempt}")
        assert refused(outcome), attempt
        assert "secret" not in outcome.stdout + outcome.stderr
    assert keys.read_text() == "secret of the run"
    assert (keys.stat().st_mode, keys.stat().st_mtime) == (before.st_mode, before.st_mtime)


def test_a_file_of_the_interpreter_is_not_emptied_by_opening_it(tmp_path):
    """It can be read, and belongs to the user; Landlock before its third version lets O_TRUNC pass."""
    program = "import os; os.open(os.__file__, os.O_RDONLY | os.O_TRUNC)"
    assert refused(run_program(program))
    assert Path(os.__file__).stat().st_size > 0


def test_root_is_nobody_special():
    """Nor is anybody else: these are the calls that the table lacks, made past Python."""
    outcome = run_program(
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "def refused(name, *arguments):\n"
        "    assert getattr(libc, name)(*arguments) == -1 and ctypes.get_errno() == 1, name\n"
        "refused('mount', None, b'/', None, 0, None)\n"
        "refused('unshare', 0x10000000)\n"
        "refused('setuid', 0)\n"
        "refused('ptrace', 0, 0, None, None)\n"
        "refused('shmget', 0, 4096, 0o1600)\n"
        "refused('memfd_create', b'x', 0)\n"
        "refused('prctl', 1, 0, 0, 0, 0)\n"  # PR_SET_PDEATHSIG
        "print('all refused')"
    )
    assert outcome.stdout == "all refused\n", outcome


def test_it_ends_with_its_parent_and_the_next_process_cleans_up(tmp_path):
    script = (
        f"import tempfile; tempfile.tempdir = {str(tmp_path)!r}\n"
        "from asyncrl.reward.sandbox.sandbox import run_program\n"
        "run_program('import time; time.sleep(3600)')"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)

    def at_work():
        found = []
        for process in psutil.Process(parent.pid).children():
            with suppress(FileNotFoundError):  # it tries the sandbox out first
                file = Path(*command(process)[-1:])
                if file.name == "program.py" and "sleep" in file.read_text():
                    found.append(process)
        return found

    try:
        (program,) = asyncio.run(until(at_work, "the program"))
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    asyncio.run(until(lambda: not is_running(program.pid), "the program's end"))
    assert list(tmp_path.glob(f"{scratch.PREFIX}*"))
    scratch._sweep.cache_clear()
    assert run_program("print(1)").stdout == "1\n"  # `nothing_left` sees that the rest is gone as well


def test_a_folder_in_use_is_not_swept_away():
    with scratch.scratch_folder() as folder:
        scratch._sweep.cache_clear()
        with scratch.scratch_folder():
            assert folder.is_dir()


@pytest.mark.parametrize(
    ("where", "name", "value", "message"),
    [
        (confine, "landlock_abi", lambda: 0, "offers no Landlock.* use Linux 5.13"),
        (confine, "has_seccomp", lambda machine: False, "has no seccomp filters"),
        (
            sandbox.platform,
            "machine",
            lambda: "riscv64",
            "on x86_64 or aarch64, and this is linux on riscv64",
        ),
        (sandbox.sys, "platform", "darwin", "and this is darwin on"),
    ],
)
def test_where_it_cannot_be_kept_nothing_runs_and_the_reason_is_said(
    monkeypatch, where, name, value, message
):
    monkeypatch.setattr(where, name, value)
    with pytest.raises(SandboxError, match=message):
        sandbox.check()


def test_an_interpreter_that_cannot_be_confined_is_an_error_and_no_outcome(monkeypatch):
    monkeypatch.setattr(sandbox, "_LIBRARIES", ())
    monkeypatch.setattr(sandbox, "_interpreter", lambda: iter(()))
    with pytest.raises(SandboxError, match=r"the sandbox did not start: .*Permission denied"):
        run_program("print(1)")


def test_the_numbers_of_the_system_calls_are_the_kernels():
    headers = {
        "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        "aarch64": Path("/usr/include/asm-generic/unistd.h"),
    }
    assert headers.keys() == AUDIT_ARCH.keys()
    found = {machine: header for machine, header in headers.items() if header.exists()}
    if not found:
        pytest.skip("this machine has no headers of the kernel")
    for machine, header in found.items():
        defined = [
            line.split() for line in header.read_text().splitlines() if line.startswith("#define __NR")
        ]
        numbers = {
            name.removeprefix("__NR3264_").removeprefix("__NR_"): int(number)
            for _, name, number, *_ in (d for d in defined if len(d) > 2 and d[2].isdigit())
        }
        if machine == "aarch64":
            numbers["newfstatat"] = numbers["fstatat"]
        allowed = allowed_calls(machine)
        assert len(allowed) > 90
        known = {name: numbers[name] for name in allowed if name in numbers}
        assert known == {name: allowed[name] for name in known}
        assert allowed.keys() - known.keys() <= {"futex_waitv"}
