"""The error tree that crosses process borders, as code and text, never as a traceback.

    HeadraceError                500  a fault of ours
    +-- InvalidRequest           400  what the client sent cannot be meant
    |   +-- InvalidJson, UnknownField, MissingField, WrongType, OutOfRange, InvalidText
    |   +-- WrongPassword, PromptChoice, InvalidEventId, InvalidCursor, InvalidHeader, NotConfirmed
    |   +-- InvalidHttp                   not even a request
    +-- Unauthenticated          401
    |   +-- LoginRefused
    +-- Forbidden                403  known, but its role does not allow it
    |   +-- CsrfRefused
    +-- NotFound                 404  no such job, or another tenant's: the two are not told apart
    +-- MethodNotAllowed         405
    +-- BodyTimeout              408  its body came too slowly
    +-- Conflict                 409  the job's state does not allow it
    |   +-- JobAlreadyEnded, LastAdmin, NameTaken, NotPaused
    |   +-- JobNotRetryable, JobNotQueued, BulkChanged
    |   +-- LetterReplayed, ReplayUnderWay, ReplayEnded
    +-- BodyTooLarge             413
    +-- UriTooLong               414
    +-- UnsupportedMediaType     415
    +-- ExpectationFailed        417
    +-- Unprocessable            422  well-formed, but this fleet cannot do it
    |   +-- UnknownModel, PromptTooLong, TokenOutOfVocabulary, ChatTemplateRefused
    |   +-- IdempotencyMismatch, BulkTooLarge
    +-- LockedOut                429  too many wrong passwords
    +-- Overloaded               429  more waits than is let in: come back after Retry-After
    |   +-- QueueFull, TenantQueueFull
    +-- HeaderTooLarge           431
    +-- Unavailable              503  try again
    |   +-- DatabaseUnavailable, QueueUnavailable, LoginBusy
    |   +-- SearchTooBroad                 not before it is narrowed
    +-- JobFailed                     how a job that was accepted can end (kept in the job's row)
    |   +-- EngineRefused, DeadlineExceeded, Poison, JobUnreadable
    +-- ConfigurationError            a process cannot start like this
    +-- WireError                     bytes that are not a message of this version (wire.py)

Each class has `code` (stable, part of the API), `http_status` and `retryable`. The text has three
parts: what was asked, what was found (both values), what to do.

Called by: everything. Imports nothing of ours.
"""

from __future__ import annotations

from typing import ClassVar


class HeadraceError(Exception):
    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, detail: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after_s = retry_after_s  # sent as Retry-After where it is set


class InvalidRequest(HeadraceError):
    code = "invalid_request"
    http_status = 400


class InvalidJson(InvalidRequest):
    code = "invalid_json"


class UnknownField(InvalidRequest):
    code = "unknown_field"


class MissingField(InvalidRequest):
    code = "missing_field"


class WrongType(InvalidRequest):
    code = "wrong_type"


class OutOfRange(InvalidRequest):
    code = "out_of_range"


class WrongPassword(InvalidRequest):
    code = "wrong_password"  # one's own, for a new one; at a login it is LoginRefused


class InvalidText(InvalidRequest):
    code = "invalid_text"  # not UTF-8, a NUL, or a lone surrogate


class PromptChoice(InvalidRequest):
    code = "prompt_choice"  # not exactly one of prompt, prompt_token_ids, messages


class InvalidEventId(InvalidRequest):
    code = "invalid_event_id"


class InvalidCursor(InvalidRequest):
    code = "invalid_cursor"


class InvalidHeader(InvalidRequest):
    code = "invalid_header"


class InvalidHttp(InvalidRequest):
    code = "invalid_http"  # a head or a body that RFC 9112 does not allow


class NotConfirmed(InvalidRequest):
    code = "not_confirmed"  # what was typed is not what is to be destroyed


class Unauthenticated(HeadraceError):
    code = "unauthenticated"
    http_status = 401


class LoginRefused(Unauthenticated):
    code = "login_refused"  # unknown name, wrong password and disabled are not told apart


class Forbidden(HeadraceError):
    code = "forbidden"
    http_status = 403


class CsrfRefused(Forbidden):
    code = "csrf_refused"


class NotFound(HeadraceError):
    code = "not_found"
    http_status = 404


class MethodNotAllowed(HeadraceError):
    code = "method_not_allowed"
    http_status = 405


class BodyTimeout(HeadraceError):
    code = "body_timeout"
    http_status = 408
    retryable = True


class Conflict(HeadraceError):
    code = "conflict"
    http_status = 409


class JobAlreadyEnded(Conflict):
    code = "job_already_ended"


class JobNotRetryable(Conflict):
    code = "job_not_retryable"


class JobNotQueued(Conflict):
    code = "job_not_queued"


class BulkChanged(Conflict):
    code = "bulk_changed"  # the filter matches other jobs than when it was counted


class LetterReplayed(Conflict):
    code = "letter_replayed"  # once already; it may be asked for again by name


class ReplayUnderWay(Conflict):
    code = "replay_under_way"  # of the same letters


class ReplayEnded(Conflict):
    code = "replay_ended"


class LastAdmin(Conflict):
    code = "last_admin"


class NameTaken(Conflict):
    code = "name_taken"


class NotPaused(Conflict):
    code = "not_paused"


class BodyTooLarge(HeadraceError):
    code = "body_too_large"
    http_status = 413


class UriTooLong(HeadraceError):
    code = "uri_too_long"
    http_status = 414


class UnsupportedMediaType(HeadraceError):
    code = "unsupported_media_type"
    http_status = 415


class ExpectationFailed(HeadraceError):
    code = "expectation_failed"
    http_status = 417


class HeaderTooLarge(HeadraceError):
    code = "header_too_large"
    http_status = 431


class Unprocessable(HeadraceError):
    code = "unprocessable"
    http_status = 422


class UnknownModel(Unprocessable):
    code = "unknown_model"


class PromptTooLong(Unprocessable):
    code = "prompt_too_long"


class TokenOutOfVocabulary(Unprocessable):
    code = "token_out_of_vocabulary"


class ChatTemplateRefused(Unprocessable):
    code = "chat_template_refused"


class IdempotencyMismatch(Unprocessable):
    code = "idempotency_mismatch"


class BulkTooLarge(Unprocessable):
    code = "bulk_too_large"


class LockedOut(HeadraceError):
    code = "locked_out"
    http_status = 429
    retryable = True


class Overloaded(HeadraceError):
    code = "overloaded"
    http_status = 429
    retryable = True


class QueueFull(Overloaded):
    code = "queue_full"  # of the model: jobs or tokens


class TenantQueueFull(Overloaded):
    code = "tenant_queue_full"  # others may still get in


class Unavailable(HeadraceError):
    code = "unavailable"
    http_status = 503
    retryable = True


class DatabaseUnavailable(Unavailable):
    code = "database_unavailable"


class QueueUnavailable(Unavailable):
    code = "queue_unavailable"


class SearchTooBroad(Unavailable):
    code = "search_too_broad"
    retryable = False


class LoginBusy(Unavailable):
    code = "login_busy"  # as many passwords as a process checks at once are being checked


class JobFailed(HeadraceError):
    """How an accepted job can end in `failed` or `expired`; stored as code and text in its row."""

    code = "job_failed"


class EngineRefused(JobFailed):
    code = "engine_refused"  # the sequence can never fit, or the engine could not run it


class DeadlineExceeded(JobFailed):
    code = "deadline_exceeded"


class Poison(JobFailed):
    code = "poison"  # it ran alone and its engine died of it: it has a dead letter


class JobUnreadable(JobFailed):
    code = "job_unreadable"  # its row is nothing that this version's gateway writes


class ConfigurationError(HeadraceError):
    code = "configuration"


def all_errors() -> list[type[HeadraceError]]:
    """Return every class of the tree, in a stable order (docs, and the test of unique codes)."""
    found: list[type[HeadraceError]] = []
    stack: list[type[HeadraceError]] = [HeadraceError]
    while stack:
        cls = stack.pop()
        found.append(cls)
        stack.extend(cls.__subclasses__())
    return sorted(found, key=lambda cls: cls.code)
