"""Which errors of a store's library may pass by themselves, and what is said of them."""

from __future__ import annotations

import aiohttp
import pytest
from botocore import exceptions as boto
from botocore.exceptions import ClientError
from botocore.parsers import ResponseParserError
from fsspec.exceptions import FSTimeoutError
from s3fs.errors import translate_boto_error

from freesolo.data import retry
from freesolo.data.retry import Patience
from freesolo.data.stores import ask, explained, is_transient
from freesolo.errors import JobError, UsageError


def refusal(status: int, code: str) -> OSError:
    """What s3fs makes of an answer of S3's."""
    answer = {"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error: OSError = translate_boto_error(ClientError(answer, "GetObject"))
    return error


@pytest.mark.parametrize(
    "error",
    [
        refusal(503, "SlowDown"),
        refusal(503, "503"),
        refusal(500, "InternalError"),
        refusal(429, "TooManyRequests"),
        refusal(400, "RequestTimeout"),
        refusal(400, "BadDigest"),
        refusal(404, "NoSuchUpload"),
        ClientError({"ResponseMetadata": {"HTTPStatusCode": 502}}, "PutObject"),
        aiohttp.ClientPayloadError("response payload is not completed"),
        aiohttp.ServerDisconnectedError(),
        ConnectionResetError(),
        TimeoutError(),
        FSTimeoutError(),
        boto.ReadTimeoutError(endpoint_url="http://x"),
        boto.ConnectTimeoutError(endpoint_url="http://x"),
        boto.EndpointConnectionError(endpoint_url="http://x"),
        boto.ConnectionClosedError(endpoint_url="http://x"),
        boto.ResponseStreamingError(error="cut"),
        boto.IncompleteReadError(actual_bytes=1, expected_bytes=2),
        boto.FlexibleChecksumError(error_msg="expected other bytes"),
        boto.SSLError(endpoint_url="https://x", error="EOF occurred in violation of protocol"),
        ResponseParserError("<html>"),
    ],
    ids=repr,
)
def test_what_may_pass(error: Exception) -> None:
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        refusal(403, "AccessDenied"),
        refusal(403, "SignatureDoesNotMatch"),
        refusal(404, "NoSuchKey"),
        refusal(404, "NoSuchBucket"),
        refusal(400, "InvalidBucketName"),
        refusal(412, "PreconditionFailed"),
        FileNotFoundError("x"),
        PermissionError("x"),
        OSError(28, "No space left on device"),
        boto.NoCredentialsError(),
        boto.SSLError(endpoint_url="https://x", error="[SSL: CERTIFICATE_VERIFY_FAILED] self-signed"),
        ValueError("a bug"),
    ],
    ids=repr,
)
def test_what_will_not_pass(error: Exception) -> None:
    assert not is_transient(error)


def test_a_web_server_that_is_away_may_come_back() -> None:
    """fsspec says "no such file" of it."""
    error = FileNotFoundError("http://x/y")
    error.__cause__ = aiohttp.ClientConnectionError("refused")
    assert is_transient(error)


def failing(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "kind", "line"),
    [
        (ConnectionResetError("cut"), JobError, r"the store cannot be reached \(cut; tried \d+ times in 0 s\); check"),
        (aiohttp.ClientPayloadError("short"), JobError, r"the store cannot be reached \(short; tried \d+ times"),
        (refusal(503, "SlowDown"), JobError, r"\[Errno 16\] SlowDown; tried \d+ times in 0 s$"),
        (refusal(403, "AccessDenied"), UsageError, r"access denied \(AccessDenied\); check the credentials"),
        (boto.NoCredentialsError(), UsageError, "no credentials; set AWS_ACCESS_KEY_ID"),
        (refusal(404, "NoSuchKey"), UsageError, "no such file or bucket; check the URL$"),
    ],
    ids=repr,
)
def test_what_is_said(error: Exception, kind: type[Exception], line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "PATIENCE", Patience(seconds=0.05, first_wait=0.01))
    with pytest.raises(kind, match=f"^s3://b/x: {line}"):
        ask("s3://b/x", lambda: failing(error))


def test_what_is_not_tried_again_is_explained_too() -> None:
    """For calls that must not be made twice."""
    with pytest.raises(JobError, match=r"^s3://b/x: the store cannot be reached \(cut\); check"), explained("s3://b/x"):
        raise aiohttp.ClientPayloadError("cut")


def test_a_bug_is_no_store_s_fault() -> None:
    with pytest.raises(ValueError, match="a bug"):
        ask("s3://b/x", lambda: failing(ValueError("a bug")))
