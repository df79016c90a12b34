"""What a reader may not do, noticed by the interpreter's audit events while a case runs, and limits for its process."""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
from pathlib import Path

NEVER = {
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.spawn", "pty.spawn"),
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "ctypes.dlopen", "pickle.find_class"),
    *("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown"),
    *("shutil.copyfile", "shutil.move", "shutil.rmtree", "shutil.copytree", "shutil.unpack_archive"),
    *("tempfile.mkstemp", "tempfile.mkdtemp"),
}
"""Events that reading a file has no reason for. Writing is noticed by how a file is opened."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

SECONDS = 5.0
"""Of one case, of the processor's time: files of a few kilobytes."""
MEMORY = 2 << 30
"""Bytes of addresses that a process may take on top of what its imports took."""


class Hang(BaseException):
    """A case took longer than SECONDS."""


class Guard:
    """`seen` fills with sentences while it is `armed`. root: the only directory that may be read, apart from Python's
    own and what `also` names."""

    def __init__(self, root: Path, also: tuple[Path, ...] = ()):
        own = {
            sys.prefix,
            sys.base_prefix,
            os.path.dirname(os.__file__),
            "/proc",
            "/sys",
            "/usr",
            "/dev/null",
            *sys.path,
            Path(__file__).parents[2],  # a warning shows a line of the sources
        }
        self.allowed = tuple(os.path.realpath(p) for p in (root, *also, *filter(None, own)))
        self.root, self.armed, self.seen = os.path.realpath(root), False, []
        tempfile.gettempdir()  # is tried by writing to it, once
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple) -> None:
        if not self.armed:
            return
        if event == "open":
            path, mode, flags = args
            if isinstance(path, int):
                return
            path = os.fsdecode(path)
            if flags & WRITES or (isinstance(mode, str) and set(mode) & set("wax+")):
                self._say(f"opened '{path}' to write")
            # what a link in the tree points to is read like a file: see docs/hostile_input.md
            place = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
            if not place.startswith(self.allowed):
                self._say(f"opened '{path}', which is not part of the input")
        elif event == "exec":
            code = args[0]
            if os.path.realpath(code.co_filename).startswith(self.root):
                self._say(f"executed {code.co_filename}")
        elif event in NEVER:
            self._say(f"{event} {str(args)[:80]}")

    def _say(self, what: str) -> None:
        if len(self.seen) < 10:
            self.seen.append(what)


def limit(guard: Guard) -> None:
    """Limits for this process, and an alarm that ends a case."""

    def ring(*_: object) -> None:
        if guard.armed:
            raise Hang

    signal.signal(signal.SIGPROF, ring)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 26, 1 << 26))


def grown() -> int:
    """The largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
