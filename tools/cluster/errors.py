"""What a local cluster can fail at, grouped by the moment.

Rules kept here: a child that dies is named with its exit and its last lines, because its log is gone with the
cluster's directory.
"""

from __future__ import annotations

from snowskin.transport.errors import SnowskinError


class ChildFailed(SnowskinError):
    """A child process ended, or said nothing in time, before it was ready."""

    status = "UNAVAILABLE"


class ChildRefused(ChildFailed):
    """A child process refused its settings (exit status 2): a start with the same ones fails again."""

    status = "FAILED_PRECONDITION"


class ChildGivenUp(SnowskinError):
    """A child process died too often in a row to be restarted once more."""

    status = "UNAVAILABLE"


class ChildUnknown(SnowskinError):
    """No child process of that name belongs to this cluster."""

    status = "NOT_FOUND"


class ClusterNotReady(SnowskinError):
    """The processes run, but the conductor did not see all instances in time."""

    status = "DEADLINE_EXCEEDED"


class RequestFailed(SnowskinError):
    """The cluster answered a chat request with an error, or not to its end."""

    status = "UNAVAILABLE"
