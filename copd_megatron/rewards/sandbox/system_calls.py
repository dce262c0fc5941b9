"""System calls that no program in the sandbox may make: other processes' memory, mounts, namespaces, keys,
memory that belongs to no process (and so escapes the limits), and kernel interfaces that are seldom needed
and often attacked."""

from __future__ import annotations

import platform
import struct

_EVERYWHERE = (
    *(425, 426, 427),  # io_uring
    *(428, 429, 430, 431, 432, 433, 442),  # open_tree, move_mount, fsopen, ..., mount_setattr
    438,  # pidfd_getfd
    447,  # memfd_secret
)
_X86_64 = (
    *(101, 310, 311, 312),  # ptrace, process_vm_readv, process_vm_writev, kcmp
    *(155, 161, 165, 166, 272, 308),  # pivot_root, chroot, mount, umount2, unshare, setns
    *(248, 249, 250),  # add_key, request_key, keyctl
    *(298, 303, 304, 321, 323),  # perf_event_open, name_to_handle_at, open_by_handle_at, bpf, userfaultfd
    *(29, 64, 68, 319),  # shmget, semget, msgget, memfd_create
)
_AARCH64 = (
    *(117, 270, 271, 272),
    *(41, 51, 40, 39, 97, 268),
    *(217, 218, 219),
    *(241, 264, 265, 280, 282),
    *(194, 190, 186, 279),
)
_MACHINES = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}
"""The kernel's number of the architecture, and the numbers of the calls there, in the same order."""

_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_KILL, _REFUSE, _ALLOW = 0x80000000, 0x00050001, 0x7FFF0000
"""What the kernel does: end the process, fail with EPERM, go on."""
_OTHER_ABI = 0x40000000
"""Call numbers from here on belong to x86's 32-bit pointers, which nobody needs."""


def refused_calls() -> bytes | None:
    """A filter as ``bwrap --seccomp`` takes it (an array of ``struct sock_filter``); None for an architecture
    whose numbers are not listed here, where the namespaces alone must hold."""
    if platform.machine() not in _MACHINES:
        return None
    architecture, own = _MACHINES[platform.machine()]
    calls = (*own, *_EVERYWHERE)
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    program.append((_AT_LEAST, len(calls) + 1, 0, _OTHER_ABI))
    program += [(_EQUAL, len(calls) - index, 0, call) for index, call in enumerate(calls)]
    program += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)]
    return b"".join(struct.pack("=HBBI", *step) for step in program)
