"""S3 that is waited for: one that answers 503, late, or for a moment not at all, is asked again for a minute and a half."""

from typing import Any

from pyarrow import fs

__all__ = ["patient"]

# AWS's client waits 25 ms, then twice as long each time: 102 s in all. Arrow asks again for 6 s, and a pickled filesystem of its for one.
_RETRIES = 12


def patient(filesystem: fs.FileSystem) -> fs.FileSystem:
    """Return the same store by the same credentials, with patience where it is S3; pyarrow has it for GCS."""
    if not isinstance(filesystem, fs.S3FileSystem) or isinstance(filesystem, _PatientS3):
        return filesystem
    _, (options,) = filesystem.__reduce__()
    return _PatientS3(**options)


class _PatientS3(fs.S3FileSystem):
    """pyarrow's S3 with more patience, which is not lost on the way to another process."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, retry_strategy=fs.AwsDefaultS3RetryStrategy(max_attempts=_RETRIES))

    def __reduce__(self) -> tuple[Any, ...]:
        _, options = super().__reduce__()
        return _opened, options


def _opened(options: dict[str, Any]) -> _PatientS3:
    return _PatientS3(**options)
