"""Random loss of packets that a device receives, by an XDP program of seven instructions in the kernel.

netem is the usual tool, but many kernels lack it. Packets are lost before any queue, as on a bad cable.
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
"""Generic XDP: every device supports it, and a veth pair needs no program at its other end."""
_XDP_DROP, _XDP_PASS = 1, 2
_GET_PRANDOM_U32 = 7
_CALL, _EXIT, _MOV, _AND, _JUMP_IF_AT_LEAST = 0x85, 0x95, 0xB7, 0x57, 0x35
_ATTRIBUTES = 128
_SHARES = 1 << 16


def _program(share: float) -> bytes:
    def instruction(code: int, *, jump: int = 0, value: int = 0) -> bytes:
        return struct.pack("<Hhi", code, jump, value)

    # r0 = random & 0xffff, drawn for each packet. The register byte after each code is 0: all operate on r0.
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


def _bpf(command: int, form: str, attributes: tuple[int, ...]) -> int:
    number = _SYS_BPF.get(platform.machine())
    if number is None:
        raise NoLabError(
            f"packets cannot be lost on {platform.machine()}: the number of its bpf system call is not in this file"
        )
    buffer = ctypes.create_string_buffer(struct.pack(form, *attributes), _ATTRIBUTES)
    file = _LIBC.syscall(number, command, buffer, _ATTRIBUTES)
    if file < 0:
        raise NoLabError(f"the kernel refuses the XDP program: {os.strerror(ctypes.get_errno())}")
    return int(file)


@contextlib.contextmanager
def losing(namespace: Namespace, share: float, device: str = "eth0") -> Iterator[None]:
    """While the context lasts, `device` loses `share` (0 to 1) of the packets that it receives. Raises NoLabError."""
    program, licence = ctypes.create_string_buffer(_program(share)), ctypes.create_string_buffer(b"GPL")
    count = len(_program(share)) // 8
    with contextlib.ExitStack() as stack:
        addresses = (ctypes.addressof(program), ctypes.addressof(licence))
        loaded = _bpf(_PROG_LOAD, "<IIQQ", (_TYPE_XDP, count, *addresses))
        stack.callback(os.close, loaded)
        with namespace.entered():
            link = _bpf(_LINK_CREATE, "<IIII", (loaded, socket.if_nametoindex(device), _ATTACH_XDP, _SKB_MODE))
        stack.callback(os.close, link)  # closing it detaches the program
        yield
