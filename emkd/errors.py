"""Every exception that emkd raises on purpose.

    EmkdError
    ├── UsageError          (ValueError)         the call was wrong; exit code 2
    │   ├── InputNotFoundError (FileNotFoundError)  a file, folder or model that was named does not exist
    │   ├── OutputExistsError  (FileExistsError)    an output folder is not empty
    │   ├── TokenizerMismatchError                  student and teacher read text differently
    │   ├── GeometryMismatchError                   student and teacher see different parts of an image
    │   ├── CacheConflictError                      a cache was made with other settings than requested
    │   └── DataMismatchError                       the cache was made from other data
    ├── DataFormatError     (ValueError)         a dataset file is not in a known format
    ├── ModelError          (ValueError)         a checkpoint cannot be used as teacher or student
    ├── CacheError
    │   ├── CacheIncompleteError                    the cache is not sealed
    │   ├── CacheVersionError                       written by a newer emkd
    │   ├── SampleNotFoundError (KeyError)          no such sample
    │   ├── TeacherMismatchError (ValueError)       a live teacher's outputs differ from the cache
    │   ├── DamagedCacheError   (OSError)           a stored object is missing, cut short or changed
    │   └── CacheWriteError     (OSError)           a full disk, a folder that cannot be written
    ├── JobFailedError      (RuntimeError)       the teacher's job, or training on several workers, could not finish
    ├── DamagedCheckpointError (OSError)         a checkpoint is not as it was saved
    ├── TrainingDivergedError (ArithmeticError)  a student's logits are not finite
    ├── StoppedError                             SIGINT or SIGTERM ended a command; exit code 130 or 143
    └── SampleError         (ValueError)         one row cannot be used; `reason` is a stable short code

A message says what is wrong, where, what was expected, what was found, and what to do next. The command line prints it
and exits with `exit_code`; only exceptions outside this hierarchy show a traceback.
"""

from emkd.text import one_line


class EmkdError(Exception):
    """Root of all errors that emkd raises on purpose."""

    exit_code = 1


class UsageError(EmkdError, ValueError):
    """The call itself was wrong: the same call would fail again."""

    exit_code = 2


class InputNotFoundError(UsageError, FileNotFoundError):
    """A file, folder or model that was named does not exist."""


class OutputExistsError(UsageError, FileExistsError):
    """An output folder exists already and would be overwritten."""


class TokenizerMismatchError(UsageError):
    """Student and teacher do not share a tokenizer."""


class GeometryMismatchError(UsageError):
    """Student and teacher see different parts of an image."""


class CacheConflictError(UsageError):
    """A cache exists at the URI and was made with other settings."""


class DataMismatchError(UsageError):
    """The data are not those that the cache was made from."""


class DataFormatError(EmkdError, ValueError):
    """A dataset file cannot be read in one of the documented formats with the documented columns."""


class ModelError(EmkdError, ValueError):
    """A checkpoint cannot be used: weights missing, no image token, an unsupported family."""


class CacheError(EmkdError):
    """A cache cannot be used or written."""


class CacheIncompleteError(CacheError):
    """The cache has no seal: its job did not finish."""


class CacheVersionError(CacheError):
    """The cache was written in a newer format than this version reads."""


class SampleNotFoundError(CacheError, KeyError):
    """The cache has no such sample."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class TeacherMismatchError(CacheError, ValueError):
    """A live teacher reads a cached sample differently, or its outputs differ from the cache."""


class DamagedCacheError(CacheError, OSError):
    """A stored object is missing, cut short, or does not match its hash."""


class CacheWriteError(CacheError, OSError):
    """The folder of a cache cannot be written: the disk is full or read-only, or permission is denied.

    What was committed stays; every other shard would fail in the same way.
    """


class JobFailedError(EmkdError, RuntimeError):
    """The teacher's job, or training on several workers, could not finish; what was committed or saved stays."""


class DamagedCheckpointError(EmkdError, OSError):
    """A file of a checkpoint is missing or not as it was saved."""


class TrainingDivergedError(EmkdError, ArithmeticError):
    """A student's logits are infinite or NaN: its tokens cannot be matched, and no step would improve it."""


class StoppedError(EmkdError):
    """SIGINT (Ctrl-C) or SIGTERM ended a command; the message says what it left.

    exit_code: 130 or 143
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[type, tuple[str, int]]:  # travels between processes
        return (type(self), (str(self), self.exit_code))


class SampleError(EmkdError, ValueError):
    """One row of a dataset cannot be used.

    `reason` is a short stable code; `detail` is one line without control characters, whatever the row has. The index
    stores both, and the terminal shows them.
    """

    def __init__(self, reason: str, detail: str) -> None:
        detail = one_line(detail)
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # travels between processes
        return (type(self), (self.reason, self.detail))
