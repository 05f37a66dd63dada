"""A client of CRI's image service on the socket of a containerd: kubelet pulls images in this way.

The messages are those of k8s.io/cri-api (pkg/apis/runtime/v1/api.proto), reduced to the fields that tests use.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from tests.support.processes import wait_for

TIMEOUT_S = 120.0
PACKAGE = "runtime.v1"
PROTO = """
message ImageSpec { string image = 1; }
message AuthConfig {
  string username = 1; string password = 2; string auth = 3;
  string server_address = 4; string identity_token = 5; string registry_token = 6;
}
message Image { string id = 1; repeated string repo_tags = 2; repeated string repo_digests = 3; }
message PullImageRequest { ImageSpec image = 1; AuthConfig auth = 2; }
message PullImageResponse { string image_ref = 1; }
message ImageStatusRequest { ImageSpec image = 1; }
message ImageStatusResponse { Image image = 1; }
message ListImagesRequest { }
message ListImagesResponse { repeated Image images = 1; }
message RemoveImageRequest { ImageSpec image = 1; }
message RemoveImageResponse { }
"""


def _messages() -> dict[str, Any]:
    """The message classes that PROTO describes, by name."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="cri.proto", package=PACKAGE, syntax="proto3")
    for name, body in re.findall(r"message (\w+) \{(.*?)\}", PROTO, re.DOTALL):
        message = file.message_type.add(name=name)
        for repeated, kind, called, number in re.findall(r"(repeated )?(\w+) (\w+) = (\d+);", body):
            label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            part = message.field.add(name=called, number=int(number), label=label, type=field.TYPE_STRING)
            if kind != "string":
                part.type, part.type_name = field.TYPE_MESSAGE, f".{PACKAGE}.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    names = [message.name for message in file.message_type]
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in names}


_MESSAGES = _messages()


@dataclass(frozen=True, slots=True)
class CriImage:
    """`id` is the digest of the image's config."""

    id: str
    tags: tuple[str, ...]
    digests: tuple[str, ...]


class ImageService:
    """The image service of one containerd. A refused call raises grpc.RpcError, whose text has the reason."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    def pull(self, reference: str, auth: Mapping[str, str] | None = None) -> str:
        """Returns the image's id. `auth` has fields of AuthConfig, as kubelet makes them from an imagePullSecret."""
        answer = self._call("PullImage", image={"image": reference}, **({"auth": dict(auth)} if auth else {}))
        return str(answer.image_ref)

    def status(self, reference: str) -> CriImage | None:
        answer = self._call("ImageStatus", image={"image": reference})
        return _image(answer.image) if answer.HasField("image") else None

    def images(self) -> list[CriImage]:
        return [_image(image) for image in self._call("ListImages").images]

    def remove(self, reference: str) -> None:
        """When this returns, the image is also gone from the content store."""
        self._call("RemoveImage", image={"image": reference})

    def answers(self) -> bool:
        try:
            self.images()
        except grpc.RpcError:
            return False
        return True

    def _call(self, method: str, **fields: Any) -> Any:
        request, response = _MESSAGES[f"{method}Request"], _MESSAGES[f"{method}Response"]
        call = self._channel.unary_unary(
            f"/{PACKAGE}.ImageService/{method}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        return call(request(**fields), timeout=TIMEOUT_S)


def _image(message: Any) -> CriImage:
    return CriImage(message.id, tuple(message.repo_tags), tuple(message.repo_digests))


@contextlib.contextmanager
def image_service(socket: Path) -> Iterator[ImageService]:
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        service = ImageService(channel)
        wait_for("CRI answers", service.answers, every=0.05)
        yield service
