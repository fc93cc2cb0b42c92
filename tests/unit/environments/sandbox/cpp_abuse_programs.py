"""The same as `abuse_programs`, in C++: one program, which tries what its first line of input names.

It says `ESCAPED` where it succeeds; the second line holds the facts of the host.
"""

PRELUDE = r"""
#include <bits/stdc++.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <netinet/in.h>
#include <sched.h>
#include <spawn.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

std::string secret, writable, tests, abstract_name;
long victim, port;
char buffer[4096];

void attempt(long result) {
    if (result >= 0) { dprintf(1, "ESCAPED %ld\n", result); } else { perror("refused"); }
}
long reads(const std::string& path) {
    int file = open(path.c_str(), O_RDONLY);
    return file < 0 ? -1 : read(file, buffer, sizeof buffer);
}
long writes(const std::string& path) { return open(path.c_str(), O_CREAT | O_WRONLY, 0644); }
long child(long pid) {
    if (pid == 0) _exit(0);
    return pid;
}
"""

QUICK = {
    "read_secret": "attempt(reads(secret));",
    "read_passwd": 'attempt(reads("/etc/passwd"));',
    "read_tests": "attempt(reads(tests));",
    "read_by_dots": 'attempt(reads("../../../../../../../.." + secret));',
    "read_own_environment_file": 'attempt(reads("/proc/self/environ"));',
    "read_victim_memory": 'attempt(reads("/proc/" + std::to_string(victim) + "/maps"));',
    "environment": """
extern char** environ;
for (char** word = environ; *word; ++word) if (strncmp(*word, "LC_ALL=", 7)) dprintf(1, "ESCAPED %s\\n", *word);
""",
    "write_everywhere": """
for (const char* folder : {"", "/", "/tmp/", "/dev/shm/", "/dev/", "/box/", "/usr/", "/home/", "/root/", "/run/"})
    attempt(writes(std::string(folder) + "escaped"));
""",
    "write_open_file": "attempt(open(writable.c_str(), O_WRONLY));",
    "truncate": "attempt(truncate(writable.c_str(), 0));",
    "change_mode": "attempt(chmod(writable.c_str(), 0777));",
    "change_times": "attempt(utimensat(AT_FDCWD, writable.c_str(), nullptr, 0));",
    "other_descriptors": 'for (int n = 3; n < 1024; ++n) if (fcntl(n, F_GETFD) >= 0) dprintf(1, "ESCAPED %d\\n", n);',
    "fork": "attempt(child(fork()));",
    "fork_bomb": "for (int n = 0; n < 1000; ++n) attempt(child(fork()));",
    "vfork_by_number": "attempt(child(syscall(SYS_vfork)));",
    "clone_by_number": "attempt(child(syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0)));",
    "clone_with_parent": "attempt(child(syscall(SYS_clone, CLONE_PARENT | SIGCHLD, 0, 0, 0, 0)));",
    "clone3": "unsigned long words[8] = {0, 0, 0, 0, SIGCHLD}; attempt(child(syscall(435, words, sizeof words)));",
    "shell": 'attempt(system("echo ESCAPED") == 0 ? 0 : -1);',
    "spawn": """
pid_t pid;
char name[] = "id";
char* words[] = {name, nullptr};
attempt(posix_spawn(&pid, "/usr/bin/id", nullptr, nullptr, words, nullptr) == 0 ? 0 : -1);
""",
    "exec_shell_that_forks": 'execl("/bin/sh", "sh", "-c", "id && echo ESCAPED; (sleep 99) & echo ESCAPED", nullptr);',
    "kill_all": "attempt(kill(-1, SIGKILL));",
    "kill_victim": "attempt(kill(victim, SIGKILL));",
    "kill_group": "attempt(kill(-victim, SIGKILL));",
    "kill_thread": "attempt(syscall(SYS_tgkill, victim, victim, SIGKILL));",
    "signal_by_owner": """
int ends[2];
if (pipe(ends) == 0) attempt(fcntl(ends[0], F_SETOWN, victim));
""",
    "trace_me": "attempt(ptrace(PTRACE_TRACEME, 0, 0, 0));",
    "trace_victim": "attempt(ptrace(PTRACE_ATTACH, victim, 0, 0));",
    "foreign_memory": """
iovec ours{buffer, 16}, theirs{buffer, 16};
attempt(process_vm_readv(victim, &ours, 1, &theirs, 1, 0));
""",
    "outlive_supervisor": "attempt(prctl(PR_SET_PDEATHSIG, 0));",
    "raise_limits": """
rlimit all{RLIM_INFINITY, RLIM_INFINITY};
for (auto kind : {RLIMIT_AS, RLIMIT_CPU, RLIMIT_NPROC, RLIMIT_FSIZE}) attempt(setrlimit(kind, &all));
""",
    "limit_others": "rlimit one{1, 1}; attempt(prlimit(victim, RLIMIT_CPU, &one, nullptr));",
    "user_namespace": "attempt(unshare(CLONE_NEWUSER));",
    "mount": 'attempt(mount("proc", "/tmp", "proc", 0, nullptr));',
    "change_root": 'attempt(chroot("/tmp"));',
    "load_bpf": "attempt(syscall(SYS_bpf, 0, buffer, 128));",
    "ring": "attempt(syscall(425, 1, buffer));",
    "keyring": 'attempt(syscall(SYS_add_key, "user", "a", "b", 1, -3));',
    "page_faults": "attempt(syscall(SYS_userfaultfd, 0));",
    "connect": """
int ours = socket(AF_INET, SOCK_STREAM, 0);
sockaddr_in there{};
there.sin_family = AF_INET; there.sin_port = htons(port); there.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
attempt(ours < 0 ? -1 : connect(ours, (sockaddr*)&there, sizeof there));
""",
    "abstract_socket": """
int ours = socket(AF_UNIX, SOCK_STREAM, 0);
sockaddr_un there{};
there.sun_family = AF_UNIX;
memcpy(there.sun_path + 1, abstract_name.data(), abstract_name.size());
attempt(ours < 0 ? -1 : connect(ours, (sockaddr*)&there, offsetof(sockaddr_un, sun_path) + 1 + abstract_name.size()));
""",
    "memory_file": 'attempt(memfd_create("escaped", 0));',
    "system_v": "attempt(shmget(IPC_PRIVATE, 1 << 20, 0600));",
    "large_memory": """
void* got = mmap(nullptr, 2ul << 30, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
attempt(got == MAP_FAILED ? -1 : 0);
""",
    "type_into_terminal": "attempt(ioctl(0, TIOCSTI, buffer));",
    "call_of_32_bits": """
long answer;
asm volatile("int $0x80" : "=a"(answer) : "a"(20));
attempt(0);
""",
    "call_of_x32": "attempt(syscall(0x40000000 | 39));",
    "threads": """
static std::atomic<bool> release{false};
int started = 0;
try {
    for (; started < 2000; ++started) std::thread([] { while (!release) usleep(1000); }).detach();
    attempt(started);
} catch (const std::system_error& error) { puts(error.what()); }
_exit(0);
""",
}

ENDLESS = {
    "busy": ("for (volatile long n = 0;; ) n = n + 1;", {"wall"}),
    "asleep": ("sleep(1000);", {"wall"}),
    "closed_streams_asleep": ("for (int n = 0; n < 3; ++n) close(n); sleep(1000);", {"wall"}),
    "ignores_signals": ("for (int n = 1; n < 65; ++n) signal(n, SIG_IGN);\nfor (;;) pause();", {"wall"}),
    "endless_output": ("for (;;) write(1, buffer, sizeof buffer);", {"output"}),
    "endless_errors": ("for (;;) write(2, buffer, sizeof buffer);", {"output"}),
    "growing": ("for (std::vector<char> all;; ) all.resize(2 * all.size() + 1, 1);", {"killed", "exited", "wall"}),
    "deep": ("std::function<int(int)> f = [&](int n) { return f(n + 1) + 1; }; exit(f(0));", {"killed", "exited"}),
    "own_session_asleep": ("setsid(); sleep(1000);", {"wall"}),
}  # fmt: skip
"""Attempts that must be ended, and the endings that are right."""


def source():
    """All attempts as one program, so that it is compiled once."""
    attempts = QUICK | {name: code for name, (code, _) in ENDLESS.items()}
    functions = "\n".join(f"void try_{name}() {{ {code} }}" for name, code in attempts.items())
    table = ", ".join(f'{{"{name}", try_{name}}}' for name in attempts)
    return f"""{PRELUDE}
{functions}
int main() {{
    std::string name;
    std::cin >> name >> secret >> writable >> tests >> victim >> port >> abstract_name;
    std::map<std::string, void (*)()>{{{table}}}.at(name)();
}}
"""


COMPILED = {
    "includes_zeros": '#include "/dev/zero"\nint main() {}',
    "includes_noise": '#include "/dev/urandom"\nint main() {}',
    "includes_secret": '#include "SECRET"\nint main() {}',
    "includes_passwd": '#include "/etc/passwd"\nint main() {}',
    "includes_itself": '#include "main.cpp"\nint main() {}',
    "embeds_secret": 'asm(".incbin \\"SECRET\\"");\nint main() {}',
    "embeds_passwd": 'asm(".incbin \\"/etc/passwd\\"");\nint main() {}',
    "embeds_environment": 'asm(".incbin \\"/proc/self/environ\\"");\nint main() {}',
    "templates_without_end": """
template <int N, int M> struct Tree { static const int sum = Tree<N - 1, 2 * M>::sum + Tree<N - 1, 2 * M + 1>::sum; };
template <int M> struct Tree<0, M> { static const int sum = M; };
int main() { return Tree<30, 1>::sum; }
""",
    "macros_without_end": """
#define A(x) x x x x x x x x x x
#define B(x) A(A(A(A(A(A(A(A(A(A(x))))))))))
int main() { B(B(;)) }
""",
    "large_binary": "char data[200 << 20] = {1};\nint main() { return data[5]; }",
    "large_by_assembler": 'asm(".data\\n.fill 2000000000, 1, 7");\nint main() {}',
    "no_program": "int main() { return undefined_name; }",
    "says_it_passed": '#error main.cpp: PASS all tests passed\nint main() {}',
}  # fmt: skip
"""Programs that must not compile: what they reach for is not there, or they take too much of something."""
