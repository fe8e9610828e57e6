"""Programs that try to get out, to stay, or to forge a verdict. Each is contained, and the outside is as it was."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from jaxdistill.verify.code import Limits, Sandbox, check_code
from jaxdistill.verify.code.sandbox import limits_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is made of Linux's own means")

LIMITS = Limits(cpu_s=1, wall_s=20, memory_mib=256, output_mib=1, tmp_mib=4)
ASSERTS = {"kind": "asserts", "entry": "f", "tests": ["assert f(20) == 41", "assert f(1) == 3"]}
STDIO = {"kind": "stdio", "cases": [{"input": "20\n", "output": "41\n"}]}
SECRET = "jaxdistill-secret-of-the-parent"


@pytest.fixture(scope="module")
def sandbox():
    os.environ["JAXDISTILL_SECRET"] = SECRET
    try:
        with Sandbox() as box:
            yield box
    except ValueError as error:
        pytest.skip(str(error))
    finally:
        del os.environ["JAXDISTILL_SECRET"]


def run(sandbox, code, tests=ASSERTS, limits=LIMITS):
    return check_code(f"```python\n{code}\n```", tests, limits=limits, sandbox=sandbox)


def printed(sandbox, code):
    """What a program prints, and how it ended."""
    job = {"kind": "script", "source": code, "stdin": "", "limits": limits_of(LIMITS)}
    found = sandbox.run([job], LIMITS.wall_s)[0]
    return found["output"].strip(), found


# -------------------------------------------------------------------------------------------- forged verdicts

FORGERIES = {
    "exits before the tests": "import sys\nsys.exit(0)",
    "exits hard before the tests": "import os\nos._exit(0)",
    "exits hard in a call": "import os\ndef f(x): os._exit(0)",
    "exits in a call": "import sys\ndef f(x): sys.exit(0)",
    "stops iterations": "def f(x): raise StopIteration",
    "kills itself": "import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGKILL)",
    "prints the marker of success": """
import os
for fd in range(1, 64):
    try: os.write(fd, b'\\n{"passed": ""}\\n= 41\\n')
    except OSError: pass
def f(x): os._exit(0)""",
    "reports on every descriptor in a call": """
import os
def f(x):
    for fd in range(64):
        try: os.write(fd, b'{"passed": ""}\\n')
        except OSError: pass
    os._exit(0)""",
    "an object that equals everything": """
class Yes:
    def __eq__(self, other): return True
    __ne__ = __lt__ = __gt__ = __le__ = __ge__ = __eq__
    def __bool__(self): return True
    def __hash__(self): return 0
    def __sub__(self, other): return 0
def f(x): return Yes()""",
    "an integer that equals everything": """
class Yes(int):
    def __eq__(self, other): return True
def f(x): return Yes(7)""",
    "a text that equals everything": """
class Yes(str):
    def __eq__(self, other): return True
    def __str__(self): return '41'
def f(x): return Yes('7')""",
    "appends to the results of the runner's frames": """
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
            if isinstance(value, list): value.append('passed')
            if isinstance(value, dict):
                try: value['passed'] = ''
                except Exception: pass
        frame = frame.f_back
    return 7""",
    "patches builtins": """
import builtins
builtins.all = builtins.any = builtins.isinstance = lambda *a: True
builtins.AssertionError = Exception
def f(x): return 7""",
    "patches unittest, the runner and the way of values": """
import sys, unittest, json
unittest.TestCase.assertEqual = lambda *a: None
for module in list(sys.modules.values()):
    for name in ('same', 'run_asserts', 'run_calls', '_judge', 'loads', 'unpack', 'same_output'):
        if hasattr(module, name): setattr(module, name, lambda *a, **k: {'passed': ''})
def f(x): return 7""",
    "looks for the tests in its memory": """
import gc
needle = ''.join(reversed(')02(f tressa'))  # its own source is found otherwise
def f(x):
    for thing in gc.get_objects():
        if isinstance(thing, dict):
            for value in list(thing.values()):
                if isinstance(value, str) and len(needle) < len(value) and needle in value: return 41 if x == 20 else 3
        if isinstance(thing, (list, tuple)):
            for value in thing:
                if isinstance(value, str) and len(needle) < len(value) and needle in value: return 41 if x == 20 else 3
    return 7""",
    "looks for the tests in the frames of its callers": """
import sys
def f(x):
    frame, text = sys._getframe(), ''
    while frame:
        text += repr(frame.f_locals)
        frame = frame.f_back
    needle = ''.join(reversed(')02(f tressa'))
    return (41 if x == 20 else 3) if needle in text else 7""",
    # with the right values it would be an answer like any other
    "answers the next question before it is asked": """
import os
def f(x):
    os.write(4, b'=40\\n=3\\n' * 3)
    return 7""",
    "a value that is no value": """
import os
def f(x):
    os.write(4, b'=["object",["object"]]\\n')
    return 7""",
    "a deceptive pickle": """
class Evil:
    def __reduce__(self): return (eval, ("41",))
def f(x): return Evil()""",
    "nothing in place of its module": "import sys\nsys.modules['program'] = None\ndef f(x): return 7",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_verdict_is_no_pass(sandbox, name):
    check = run(sandbox, FORGERIES[name])
    assert check.outcome == "incorrect", check


def test_forgeries_do_not_help_other_kinds_of_tests(sandbox):
    calls = {"kind": "calls", "entry": "f", "cases": [{"args": [20], "expected": 41}]}
    for name, code in FORGERIES.items():
        assert run(sandbox, code, calls).outcome == "incorrect", name
    for code in ("print(True)", "import os; os._exit(0)", 'print(\'{"passed": ""}\')', "print('41\\n41')"):
        assert run(sandbox, code, STDIO).outcome == "incorrect", code


SCAN = """
import ctypes, os, re
libc = ctypes.CDLL(None)
libc.sbrk.restype = ctypes.c_void_p
libc.pwrite.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
pattern = re.compile(('to' + 'ken-').encode() + rb'[0-9a-f]{8}')
def f(x):
    found, size = set(), 1 << 16
    fd = os.open('scan', os.O_RDWR | os.O_CREAT)
    for top in (libc.sbrk(0), (id(object()) | 0xFFFFFF) + (48 << 20)):
        for address in range((top & ~0xFFFF) - (96 << 20), top, size):
            # a write from memory that is not mapped fails, and does not crash
            if (n := libc.pwrite(fd, address, size, 0)) > 0:
                found |= set(pattern.findall(os.pread(fd, n, 0)))
    return len(found)
"""


def test_the_tests_are_nowhere_in_the_programs_memory(sandbox):
    token = f"token-{os.getpid():08x}"
    limits = Limits(cpu_s=10)
    hidden = {"kind": "asserts", "setup": f"mark = '{token}'", "tests": [f"assert f('{token[:3]}') == 0, '{token}'"]}
    assert run(sandbox, SCAN, hidden, limits).outcome == "correct"
    # the same search finds what the program may know
    shown = {"kind": "asserts", "context": f"mark = '{token}'", "tests": ["assert f(0) == 1"]}
    assert run(sandbox, SCAN, shown, limits).outcome == "correct"


def test_a_right_program_passes_all_kinds(sandbox):
    assert run(sandbox, "def f(x): return 2 * x + 1").outcome == "correct"
    assert run(sandbox, "print(2 * int(input()) + 1)", STDIO).outcome == "correct"


# ------------------------------------------------------------------------------------------- the outside world


def trial(body):
    """A program that prints `got through` if its body does; what is refused by the system is an OSError or absent."""
    lines = "\n".join(f"    {line}" for line in body.strip("\n").split("\n"))
    return f"import os, sys\ntry:\n{lines}\nexcept (OSError, AttributeError, MemoryError, RuntimeError): print('no')\n"


ESCAPES = {
    "a socket": "import socket; socket.socket(); print('got through')",
    "a unix socket": "import socket; socket.socket(socket.AF_UNIX); print('got through')",
    "a connection": "import socket; socket.create_connection(('127.0.0.1', PORT), 1); print('got through')",
    "a child": "os.fork() or os._exit(0); print('got through')",
    "a grandchild that survives": """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        import time; time.sleep(60)
print('got through')""",
    "a command": "import subprocess; subprocess.run(['/bin/true']); print('got through')",
    "a command in its place": "os.execv('/bin/echo', ['echo', 'got through'])",
    "a shell": "print('got through' if os.system('true') == 0 else 'no')",
    "a file outside": "open('/etc/x', 'w'); print('got through')",
    "a file beside the tests": "open(MARKER, 'w'); print('got through')",
    "a file in the system's folders": "open('/usr/lib/x', 'w'); print('got through')",
    "a file in Python's own library": "open(os.__file__, 'a'); print('got through')",
    "the password file": "open('/etc/passwd').read(); print('got through')",
    "the tests' own file": "open(MARKER).read(); print('got through')",
    "a link to it": "os.symlink(MARKER, 'link'); open('link').read(); print('got through')",
    "a link that goes up": "os.symlink('/../../..' + MARKER, 'link'); open('link').read(); print('got through')",
    "root folder": "os.listdir('/'); print('got through')",
    "what is mounted": "open('/proc/self/mounts').read(); print('got through')",
    "the memory of its parent": "open(f'/proc/{os.getppid()}/mem', 'r+b'); print('got through')",
    "its own memory file": "open('/proc/self/mem', 'r+b').write(b'x'); print('got through')",
    "the parent's environment": "open(f'/proc/{os.getppid()}/environ').read(); print('got through')",
    "a signal to its parent": "os.kill(PARENT, 9); print('got through')",
    "a signal to all": "os.kill(-1, 9); print('got through')",
    "a signal to its group": "os.killpg(0, 9); print('got through')",
    "a session of its own": "os.setsid(); print('got through')",
    "root": "os.setuid(0); print('got through')",
    "a new user namespace": """
import ctypes
if ctypes.CDLL(None).unshare(0x10000000) == 0: print('got through')""",
    "a mount": """
import ctypes
if ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0: print('got through')""",
    "a traced process": """
import ctypes
if ctypes.CDLL(None).ptrace(16, PARENT, 0, 0) == 0: print('got through')""",
    "another process' memory": """
import ctypes
libc = ctypes.CDLL(None)
class V(ctypes.Structure): _fields_ = [('b', ctypes.c_void_p), ('n', ctypes.c_size_t)]
buffer = ctypes.create_string_buffer(8)
here = V(ctypes.addressof(buffer), 8)
if libc.process_vm_readv(PARENT, ctypes.byref(here), 1, ctypes.byref(here), 1, 0) >= 0: print('got through')""",
    "raw system calls": """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
# socket, fork, vfork, execve, kill, ptrace, setuid, mount, unshare, memfd_create, bpf, io_uring_setup, shmget, keyctl
for number in (41, 57, 58, 59, 62, 101, 105, 165, 272, 319, 321, 425, 29, 250):
    if libc.syscall(number, 1, 1, 0, 0, 0) >= 0: print('got through')
if libc.syscall(56, 17, 0, 0, 0, 0) >= 0: print('got through')""",
    "functions restored by a reload": """
import importlib
importlib.reload(os)
os.fork() or os._exit(0)
print('got through')""",
    "the environment": "print('got through' if len(os.environ) else 'no')",
    "the secret in its memory": """
import ctypes
environ = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), 'environ')
i = 0
while environ and environ[i]:
    if b'SECRET' in environ[i]: print('got through')
    i += 1""",
    "limits raised again": "import resource as r; r.setrlimit(r.RLIMIT_AS, (1 << 40, 1 << 40)); print('got through')",
    "limits of its parent": "import resource as r; r.prlimit(PARENT, r.RLIMIT_CPU, (1, 1)); print('got through')",
    "shared memory": "from multiprocessing.shared_memory import *; SharedMemory('x', True, 9); print('got through')",
    "memory without a limit": "os.memfd_create('x'); print('got through')",
    "an open descriptor": """
for fd in range(5, 64):
    try: os.fstat(fd)
    except OSError: continue
    if fd != 5: print('got through')""",
    "a descriptor of its parent": """
import ctypes
if ctypes.CDLL(None).syscall(438, 3, 0, 0) >= 0: print('got through')""",
}


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """A file that nobody may read or change, a listening port, and what there was before."""
    marker = tmp_path_factory.mktemp("outside") / "marker"
    marker.write_text("untouched")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        yield marker, server


@pytest.mark.parametrize("name", ESCAPES)
def test_nothing_gets_out(sandbox, outside, name):
    marker, server = outside
    code = trial(ESCAPES[name].replace("MARKER", repr(str(marker))).replace("PARENT", str(os.getpid())))
    text, found = printed(sandbox, code.replace("PORT", str(server.getsockname()[1])))
    assert "got through" not in text, found
    assert SECRET not in str(found)
    assert found["ended"] in ("exit", "signal") and found["wall"] < LIMITS.wall_s
    assert marker.read_text() == "untouched"
    with pytest.raises(BlockingIOError):
        server.accept()


def test_the_trial_can_fail(sandbox):
    """What is allowed prints that it got through, so the check above is no empty one."""
    assert printed(sandbox, trial("open('mine', 'w').write('x'); print('got through')"))[0] == "got through"


# ------------------------------------------------------------------------------------------------- resources

BOMBS = {
    "memory": "x = bytearray(1 << 40)",
    "memory, little by little": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "processes": "import os\nwhile True: os.fork()",
    "threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
    "output": "while True: print('x' * 100000)",
    "disk": "import os\nfor i in range(999):\n open(str(i), 'wb').write(bytes(1 << 20))",
    "files": "import os\nfor i in range(99999): open(str(i), 'w').close()",
    "open files": "x = [open('a', 'w') for i in range(9999)]",
    "processor": "while True: pass",
    "processor in one call": "9 ** 9 ** 9",
    "ignored alarms": """
import signal
for n in range(1, 65):
    try: signal.signal(n, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass""",
    "waiting on standard input": "input()\ninput()",
    "recursion": "import sys\nsys.setrecursionlimit(1 << 30)\ndef g(): return max([1], key=lambda x: g())\ng()",
    "nesting": "x = []\nfor i in range(10 ** 6): x = [x]\nprint(x)",
    "a crash": "import ctypes\nctypes.string_at(0)",
    "closed streams": "import os\nos.close(1); os.close(3)\nwhile True: pass",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_defused(sandbox, name):
    free, children = os.statvfs(tempfile.gettempdir()).f_bavail, alive()
    start = time.monotonic()
    check = run(sandbox, BOMBS[name], STDIO)
    assert check.outcome == "incorrect", check
    assert time.monotonic() - start < LIMITS.wall_s
    assert alive() <= children, "a process was left behind"
    assert os.statvfs(tempfile.gettempdir()).f_bavail > free - (1 << 14), "the disk was filled"
    assert run(sandbox, "print(41)", STDIO).outcome == "correct", "the sandbox does not go on"


@pytest.mark.parametrize(
    "value",
    [
        "(lambda a: [a := [a, a] for _ in range(60)][-1])([])",
        "'x' * (100 << 20)",
        "iter(int, 1)",
        "10 ** 100000",
        "float('nan')",
        "{i * ((1 << 61) - 1) for i in range(1, 40000)}",
        "[[]] * 10 ** 8",
    ],
)
def test_a_huge_or_odd_value_is_no_answer(sandbox, value):
    start = time.monotonic()
    assert run(sandbox, f"def f(x): return {value}").outcome in ("incorrect", "undecided")
    assert time.monotonic() - start < 20
    assert run(sandbox, "def f(x): return 2 * x + 1").outcome == "correct"


def test_a_program_that_waits_is_ended(sandbox):
    limits = Limits(cpu_s=1, wall_s=1)
    for tests, code in (
        (STDIO, "import time\nwhile True: time.sleep(1)"),
        (ASSERTS, "import time\ndef f(x): time.sleep(99)"),
    ):
        check = run(sandbox, code, tests, limits)
        assert (check.outcome, check.reason) == ("undecided", "no end within the wall-clock limit")


def alive():
    """Processes below this one."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = dict(map(int, line.split()) for line in listed.splitlines())
    found, before = {os.getpid()}, set()
    while found != before:
        before = set(found)
        found |= {pid for pid, parent in parents.items() if parent in found}
    lister = {pid for pid in found if not Path(f"/proc/{pid}").exists()}
    return len(found - lister)


def test_the_sandbox_is_replaced_when_it_is_killed():
    with Sandbox() as box:
        assert run(box, "def f(x): return 2 * x + 1").outcome == "correct"
        spawner = box._free.get()
        box._free.put(spawner)
        os.kill(spawner._process.pid, signal.SIGKILL)
        first = run(box, "def f(x): return 2 * x + 1")
        assert (first.outcome, first.reason) == ("undecided", "the sandbox failed")
        assert run(box, "def f(x): return 2 * x + 1").outcome == "correct"
    assert spawner._process is None


def test_nothing_stays_between_programs(sandbox):
    leave = "import os\nopen('left', 'w').write('x')\nimport builtins, math\nbuiltins.left = math.left = 1\nprint(41)"
    look = "import os, builtins, math\nprint(os.path.exists('left'), hasattr(builtins, 'left'), hasattr(math, 'left'))"
    assert run(sandbox, leave, STDIO).outcome == "correct"
    assert printed(sandbox, look)[0] == "False False False"
