"""Programs that try what a program in a box must not do, by name.

Each says `ESCAPED` where it succeeds. It finds in `facts` what there is on the host: a secret file and another one,
both of the user whom programs run as; a process of that user; a port and an abstract socket that listen.
"""

PRELUDE = """
import ctypes, errno, json, mmap, os, resource, signal, struct, sys, time
facts = json.loads(sys.stdin.read())
libc = ctypes.CDLL(None, use_errno=True)

def escaped(what=""):
    os.write(1, f"ESCAPED {what}\\n".encode())

def attempt(action, *arguments):
    try:
        done = action(*arguments)
    except (OSError, MemoryError, ValueError, RuntimeError) as error:
        print(type(error).__name__, error)
        return None
    escaped(repr(done)[:80])
    return done

def call(number, *arguments):
    words = [a if isinstance(a, (bytes, ctypes.Array)) or a is None else ctypes.c_long(a) for a in arguments]
    if libc.syscall(ctypes.c_long(number), *words) >= 0:
        escaped(f"system call {number}")
    else:
        print(errno.errorcode[ctypes.get_errno()])
"""

FILES = {
    "read_secret": "attempt(lambda: open(facts['secret']).read())",
    "read_passwd": "attempt(lambda: open('/etc/passwd').read())",
    "read_shadow": "attempt(lambda: open('/etc/shadow').read())",
    "read_tests": "attempt(lambda: open(facts['tests']).read())",
    "read_by_dots": "attempt(lambda: open('../' * 20 + facts['secret']).read())",
    "read_own_environment_file": "attempt(lambda: open('/proc/self/environ').read())",
    "read_environment_of_1": "attempt(lambda: open('/proc/1/environ').read())",
    "read_environment_of_parent": "attempt(lambda: open(f'/proc/{os.getppid()}/environ').read())",
    "read_victim_environment": "attempt(lambda: open(f\"/proc/{facts['victim']}/environ\").read())",
    "through_root_link": "attempt(lambda: open('/proc/self/root' + facts['secret']).read())",
    "write_own_memory_file": "attempt(lambda: open('/proc/self/mem', 'wb'))",
    "list_root_home": """
try:
    if set(os.listdir("/root")) - set(sys.base_prefix.split("/")):  # the way to the interpreter may be there
        escaped()
except OSError as error:
    print(error)
""",
    "list_home": "attempt(os.listdir, '/home')",
    "list_sys": "attempt(os.listdir, '/sys/kernel')",
    "open_disk": "[attempt(open, name, 'rb') for name in ('/dev/vda', '/dev/sda', '/dev/mem', '/dev/kmsg')]",
    "open_terminal": "[attempt(open, name, 'wb') for name in ('/dev/tty', '/dev/ptmx', '/dev/console')]",
    "list_other_descriptors": """
for number in range(3, 4096):
    try:
        os.fstat(number)
    except OSError:
        continue
    escaped(number)
""",
    "environment": "[escaped(k) for k in os.environ if k not in ('PYTHONHASHSEED', 'LC_ALL', 'LC_CTYPE', 'PWD')]",
    "write_open_file": "attempt(lambda: open(facts['writable'], 'w').write('x'))",
    "write_everywhere": """
folders = [".", "/", "/tmp", "/var/tmp", "/dev/shm", "/dev", "/box", "/usr", "/usr/lib", "/home", "/root", "/run",
           "/etc", sys.prefix, os.path.dirname(os.__file__)]
for folder in folders:
    attempt(lambda: open(folder + "/escaped", "w"))
""",
    "make_folder": "[attempt(os.mkdir, f + '/escaped') for f in ('.', '/tmp', '/dev/shm', '/usr', '/box')]",
    "make_link": "[attempt(os.symlink, '/etc', f + '/escaped') for f in ('.', '/tmp', '/dev/shm')]",
    "hard_link": "attempt(os.link, facts['secret'], '/tmp/escaped')",
    "remove_library": "attempt(os.remove, os.__file__)",
    "rename_library": "attempt(os.rename, os.__file__, os.__file__ + '.old')",
    "change_mode": "[attempt(os.chmod, f, 0o777) for f in ('/usr', sys.executable or '/usr/bin', facts['writable'])]",
    "change_times": "attempt(os.utime, facts['writable'], (0, 0))",
    "change_owner": "attempt(os.chown, facts['writable'], 0, 0)",
    "extended_attribute": "attempt(os.setxattr, facts['writable'], 'user.escaped', b'x')",
    "truncate": "attempt(os.truncate, facts['writable'], 0)",
    "truncate_by_opening": "attempt(os.open, facts['writable'], os.O_RDONLY | os.O_TRUNC)",
    "remove_own_file": "attempt(os.remove, facts['writable'])",
    "make_device": "attempt(os.mknod, '/tmp/disk', 0o60600, os.makedev(8, 0))",
    "make_fifo": "[attempt(os.mkfifo, f + '/fifo') for f in ('.', '/tmp', '/dev/shm')]",
    "open_by_handle": "call(304, -100, b'x' * 128, 0)",
    "unnamed_file": "[attempt(os.open, f, os.O_TMPFILE | os.O_RDWR) for f in ('.', '/tmp', '/dev/shm', '/usr')]",
    "fill_disk": """
for folder in (".", "/tmp", "/dev/shm"):
    with attempt(open, folder + "/big", "wb") as file:
        while True:
            file.write(bytes(1 << 20))
""",
}

PROCESSES = {
    "fork": "attempt(os.fork)",
    "fork_bomb": "\nfor _ in range(1000):\n    attempt(os.fork)",
    "vfork": "call(58)",
    "raw_clone": "call(56, signal.SIGCHLD, 0, 0, 0, 0)",
    "clone_with_parent": "call(56, 0x8000 | signal.SIGCHLD, 0, 0, 0, 0)",
    "clone3": "call(435, struct.pack('QQQQQQQQ', 0, 0, 0, 0, 17, 0, 0, 0), 64)",
    "spawn": "attempt(os.posix_spawn, '/usr/bin/id', ['id'], {})",
    "shell": "\nif os.system('echo ESCAPED') == 0:\n    escaped()",
    "subprocess": "import subprocess\nattempt(subprocess.run, ['/usr/bin/id'])",
    "multiprocessing": "import multiprocessing\nattempt(lambda: multiprocessing.get_context('fork').Process().start())",
    "exec_shell_that_forks": "os.execv('/bin/sh', ['sh', '-c', 'id && echo ESCAPED; (sleep 99) & echo ESCAPED'])",
    "exec_privileged": "os.execv('/usr/bin/su', ['su', '-c', 'echo ESCAPED'])",
    "kill_all": "attempt(os.kill, -1, signal.SIGKILL)",
    "kill_victim": "attempt(os.kill, facts['victim'], signal.SIGKILL)",
    "kill_parent": "attempt(os.kill, os.getppid(), signal.SIGKILL)",
    "kill_group": "attempt(os.killpg, facts['victim'], signal.SIGKILL)",
    "kill_thread": "call(234, facts['victim'], facts['victim'], signal.SIGKILL)",
    "queue_signal": "call(129, facts['victim'], signal.SIGKILL, bytes(128))",
    "signal_by_descriptor": "call(424, 0, signal.SIGKILL, 0, 0)",
    "signal_by_owner": """
import fcntl
reader, writer = os.pipe()
attempt(fcntl.fcntl, reader, fcntl.F_SETOWN, facts["victim"])
attempt(fcntl.fcntl, reader, 10, signal.SIGKILL)
""",
    "trace_parent": "call(101, 16, os.getppid(), 0, 0)",
    "trace_victim": "call(101, 16, facts['victim'], 0, 0)",
    "trace_me": "call(101, 0, 0, 0, 0)",
    "read_foreign_memory": "call(310, facts['victim'], bytes(16), 1, bytes(16), 1, 0)",
    "write_foreign_memory": "call(311, os.getppid(), bytes(16), 1, bytes(16), 1, 0)",
    "limit_others": "attempt(resource.prlimit, facts['victim'], resource.RLIMIT_CPU, (1, 1))",
    "slow_others": "attempt(os.setpriority, os.PRIO_PROCESS, facts['victim'], 19)",
    "pin_others": "attempt(os.sched_setaffinity, facts['victim'], {0})",
    "outlive_supervisor": "call(157, 1, 0, 0, 0, 0)",
    "raise_limits": """
for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE):
    attempt(resource.setrlimit, kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
""",
}

KERNEL = {
    "become_root": "\nfor action in (os.setuid, os.setgid):\n    action(0) if os.getuid() == 0 else attempt(action, 0)",
    "user_namespace": "call(272, 0x10000000)",
    "mount_namespace": "call(272, 0x00020000)",
    "clone_namespace": "call(56, 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0)",
    "mount_proc": "call(165, b'proc', b'/tmp', b'proc', 0, 0)",
    "remount_root": "call(165, None, b'/', None, 32 | 4096, 0)",
    "unmount": "call(166, b'/usr', 2)",
    "open_tree": "call(428, -100, b'/', 1)",
    "change_root": "attempt(os.chroot, '/tmp')",
    "pivot_root": "call(155, b'/tmp', b'/tmp')",
    "regain_capabilities": "call(126, struct.pack('=Ii', 0x20080522, 0), b'\\xff' * 24)",
    "load_module": "call(175, bytes(16), 16, b'')",
    "load_bpf": "call(321, 0, bytes(128), 128)",
    "watch_performance": "call(298, bytes(128), 0, -1, -1, 0)",
    "keyring": "call(248, b'user', b'a', b'b', 1, -3)",
    "page_faults": "call(323, 0)",
    "ring": "call(425, 1, bytes(120))",
    "handles_of_processes": "call(434, facts['victim'], 0)",
    "reboot": "call(169, 0xfee1dead, 672274793, 0, 0)",
    "set_clock": "attempt(time.clock_settime, time.CLOCK_REALTIME, time.time())",
    "rename_host": "call(170, b'escaped', 7)",
    "other_personality": "call(135, 0x0040000)",
    "type_into_terminal": "import fcntl\nattempt(fcntl.ioctl, 0, 0x5412, b'x')",
    "call_of_32_bits": """
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(b"\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3")  # getpid by int 0x80
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
escaped()
""",
    "call_of_x32": "call(0x40000000 | 39)",
}

NETWORK = {
    "connect": """
import socket
attempt(lambda: socket.create_connection(("127.0.0.1", facts["port"]), 1))
""",
    "datagram": "import socket\nattempt(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)",
    "raw_packets": "import socket\nattempt(socket.socket, socket.AF_PACKET, socket.SOCK_RAW)",
    "netlink": "import socket\nattempt(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW)",
    "host_of_machine": "import socket\nattempt(socket.socket, socket.AF_VSOCK, socket.SOCK_STREAM)",
    "abstract_socket": """
import socket
def reach():
    with socket.socket(socket.AF_UNIX) as ours:
        ours.connect("\\0" + facts["abstract"])
attempt(reach)
""",
    "listen": "import socket\nattempt(lambda: socket.create_server(('127.0.0.1', 0)))",
    "name_service": "import socket\nattempt(socket.gethostbyname, 'localhost.localdomain')",
    "send_by_socket_pair": """
import socket
ours, theirs = socket.socketpair()
attempt(ours.sendmsg, [b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", 1))])
""",
}

MEMORY = {
    "large_bytes": "attempt(lambda: len(bytearray(2 << 30)))",
    "shared_memory": "attempt(lambda: len(mmap.mmap(-1, 2 << 30)))",
    "memory_file": "attempt(os.memfd_create, 'escaped')",
    "system_v": "call(29, 0, 1 << 20, 0o1600)",
    "message_queue": "call(68, 0, 0o1600)",
    "posix_queue": "call(240, b'escaped', 0o102, 0o600, 0)",
    "locked_memory": "attempt(lambda: libc.mlockall(3) == 0 or 1 / 0) if libc.mlockall(3) == 0 else print('refused')",
    "many_descriptors": """
pipes = []
try:
    while len(pipes) < 200:
        pipes.append(os.pipe())
    escaped(len(pipes))
except OSError as error:
    print(error)
""",
    "threads": """
import threading
release = threading.Event()
started = 0
try:
    while started < 2000:
        threading.Thread(target=release.wait, daemon=True).start()
        started += 1
    escaped(started)
except RuntimeError as error:
    print(started, error)
os._exit(0)
""",
}

ENDLESS = {
    "growing_list": ("x = [0]\nwhile True:\n    x += x", {"exited", "wall"}),
    "busy": ("while True: pass", {"wall"}),
    "asleep": ("time.sleep(1000)", {"wall"}),
    "closed_streams_asleep": ("for n in (0, 1, 2): os.close(n)\ntime.sleep(1000)", {"wall"}),
    "ignores_signals": ("""
for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
while True:
    pass
""", {"wall"}),
    "stops_itself": ("signal.raise_signal(signal.SIGSTOP)\nwhile True: pass", {"wall"}),
    "endless_output": ("while True: os.write(1, b'x' * 65536)", {"output"}),
    "endless_errors": ("while True: os.write(2, b'x' * 65536)", {"output"}),
    "endless_lines": ("while True: print(1)", {"output", "wall"}),
    "long_number": ("sys.set_int_max_str_digits(0)\nprint(len(str(7 ** (10 ** 7))))", {"wall"}),
    "deep": ("sys.setrecursionlimit(1 << 30)\ndef f(): f()\nf()", {"exited", "killed", "wall"}),
    "thread_that_stays": ("""
import threading
threading.Thread(target=time.sleep, args=(1000,)).start()
""", {"wall"}),
    "exit_handler_that_stays": ("import atexit\natexit.register(time.sleep, 1000)", {"wall"}),
    "alarm_loop": ("""
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
while True:
    signal.pause()
""", {"wall"}),
    "own_session_asleep": ("\ntry: os.setsid()\nexcept OSError: pass\ntime.sleep(1000)", {"wall"}),
}  # fmt: skip
"""Programs that must be ended, and the endings that are right."""

QUICK = FILES | PROCESSES | KERNEL | NETWORK | MEMORY
