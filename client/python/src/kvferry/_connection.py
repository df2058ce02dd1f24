"""The gRPC channel of one attachment: unary calls and the stream of operations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from kvferry._attachment import Attachment
from kvferry.errors import Code, KvferryError, code_of
from kvferry.v1 import worker_pb2 as pb

_SERVICE = "/kvferry.v1.WorkerService/"
_TOKEN = "kvferry-token-bin"
_ERROR = "kvferry-error-bin"
_OPTIONS = [
    # The encoded socket path that would stand here otherwise is refused by other gRPC servers.
    ("grpc.default_authority", "localhost"),
    # Never a connection of another client of this process: it would outlive its daemon.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.max_receive_message_length", 16 << 20),
]

Response = TypeVar("Response", bound=Message)
__all__ = ["Connection", "Message", "Response", "decode_error"]


def decode_error(detail: pb.ErrorDetail) -> KvferryError:
    return KvferryError(
        code_of(detail.code),
        detail.reason,
        detail.message,
        detail.field,
        detail.retry_after_ms / 1000 if detail.retry_after_ms else None,
    )


def error_of(error: grpc.RpcError) -> KvferryError:
    # What unary calls and streams raise are grpc.Call objects too.
    call: Any = error
    for key, value in call.trailing_metadata() or ():
        if key == _ERROR:
            try:
                return decode_error(pb.ErrorDetail.FromString(value))
            except DecodeError:
                break
    status: grpc.StatusCode = call.code()
    reason = {
        grpc.StatusCode.DEADLINE_EXCEEDED: "CALL_TIMEOUT",
        grpc.StatusCode.UNAVAILABLE: "DAEMON_UNREACHABLE",
    }.get(status, "RPC_FAILED")
    return KvferryError(code_of(status.value[0]), reason, call.details() or "")


class SubmitCall(Protocol):
    """The stream's end: its answers, and how it is ended."""

    def __iter__(self) -> Iterator[pb.SubmitResponse]: ...
    def cancel(self) -> bool: ...


class Connection:
    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment
        self._metadata = ((_TOKEN, attachment.token),)
        self._channel = grpc.insecure_channel(f"unix:{attachment.grpc_path}", options=_OPTIONS)
        self._calls: dict[str, Any] = {}

    def call(
        self, method: str, request: Message, response: type[Response], timeout: float
    ) -> Response:
        """A unary call; blocks at most `timeout`."""
        stub = self._calls.get(method)
        if stub is None:
            stub = self._calls[method] = self._channel.unary_unary(
                _SERVICE + method,
                request_serializer=type(request).SerializeToString,
                response_deserializer=response.FromString,
            )
        try:
            answer: Response = stub(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error) from None
        except ValueError as error:  # the channel was closed meanwhile
            raise KvferryError(Code.UNAVAILABLE, "NOT_ATTACHED", str(error)) from None
        return answer

    def submit(self, requests: Iterator[pb.SubmitRequest]) -> SubmitCall:
        stub = self._channel.stream_stream(
            _SERVICE + "Submit",
            request_serializer=pb.SubmitRequest.SerializeToString,
            response_deserializer=pb.SubmitResponse.FromString,
        )
        call: SubmitCall = stub(requests, metadata=self._metadata)
        return call

    def close(self) -> None:
        self._channel.close()
