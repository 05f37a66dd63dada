"""A part of what a device receives is lost, at random: an XDP program of seven instructions, in the kernel.

netem is the usual way, and many kernels lack it. What is lost here is lost before any queue, as on a bad cable.
Source: bpf(2); the kernel's Documentation/bpf/instruction-set.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import socket
import struct
from collections.abc import Iterator

from tests.support.lab import Namespace, NoLabError

_LIBC = ctypes.CDLL(None, use_errno=True)
_SYS_BPF = {"x86_64": 321, "aarch64": 280}
_PROG_LOAD, _LINK_CREATE = 5, 28
_TYPE_XDP, _ATTACH_XDP = 6, 37
_SKB_MODE = 2
"""Generic: every device has it, and it needs nothing of the other end of a veth pair."""
_XDP_DROP, _XDP_PASS = 1, 2
_GET_PRANDOM_U32 = 7
_CALL, _EXIT, _MOV, _AND, _JUMP_IF_AT_LEAST = 0x85, 0x95, 0xB7, 0x57, 0x35
_ATTRIBUTES = 128
_SHARES = 1 << 16


def _program(share: float) -> bytes:
    def instruction(code: int, *, jump: int = 0, value: int = 0) -> bytes:
        return struct.pack("<BBhi", code, 0, jump, value)

    # r0 = random & 0xffff, drawn anew for each packet; all registers named here are r0.
    return b"".join(
        [
            instruction(_CALL, value=_GET_PRANDOM_U32),
            instruction(_AND, value=_SHARES - 1),
            instruction(_JUMP_IF_AT_LEAST, jump=2, value=round(share * _SHARES)),
            instruction(_MOV, value=_XDP_DROP),
            instruction(_EXIT),
            instruction(_MOV, value=_XDP_PASS),
            instruction(_EXIT),
        ]
    )


def _bpf(command: int, attributes: bytes) -> int:
    number = _SYS_BPF.get(platform.machine())
    if number is None:
        raise NoLabError(f"packets cannot be lost on {platform.machine()}: its system call is not known here")
    buffer = ctypes.create_string_buffer(attributes.ljust(_ATTRIBUTES, b"\0"), _ATTRIBUTES)
    file = _LIBC.syscall(number, command, buffer, _ATTRIBUTES)
    if file < 0:
        raise NoLabError(f"the kernel takes no XDP program: {os.strerror(ctypes.get_errno())}")
    return int(file)


@contextlib.contextmanager
def losing(namespace: Namespace, share: float, device: str = "eth0") -> Iterator[None]:
    """`share` (0 to 1) of the packets that come to the namespace's device are lost meanwhile. Raises NoLabError."""
    program, licence = ctypes.create_string_buffer(_program(share)), ctypes.create_string_buffer(b"GPL")
    count = len(_program(share)) // 8
    with contextlib.ExitStack() as stack:
        loaded = _bpf(
            _PROG_LOAD, struct.pack("<IIQQ", _TYPE_XDP, count, ctypes.addressof(program), ctypes.addressof(licence))
        )
        stack.callback(os.close, loaded)
        with namespace.entered():
            link = _bpf(
                _LINK_CREATE, struct.pack("<IIII", loaded, socket.if_nametoindex(device), _ATTACH_XDP, _SKB_MODE)
            )
        stack.callback(os.close, link)  # which takes the program off
        yield
