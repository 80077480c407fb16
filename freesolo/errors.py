"""The ways in which a run ends early on purpose. Everything else is a bug and shows its traceback."""


class UsageError(Exception):
    """What was asked for cannot be done as asked: a typo, a missing URL, settings that contradict. Exit code 2."""


class JobError(Exception):
    """What was asked for was tried and failed: bad data, a non-finite loss, a server that refuses. Exit code 1."""


class DivergedError(JobError):
    """A loss or a weight is not finite any more: the same again would end likewise."""


class TooLargeError(JobError):
    """A training needs more memory than its device has: so would the same again."""


class StoppedError(JobError):
    """The job was told to stop, and did so in good order. Exit code 143, as of a process that SIGTERM ended."""
