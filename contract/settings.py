"""One frozen, typed settings object per process, read once from the environment.

Invariants:
1. Only `from_env` turns an environment into settings; nothing else in headrace reads `os.environ`.
2. An unknown `HEADRACE_*` variable is an error: a typo must not mean "default". A variable that
   another process's settings know is no error, because one environment file serves all services.
3. Secrets have no default; where the process needs one and it is missing, it does not start.
   `HEADRACE_X_FILE` names a file to read `HEADRACE_X` from (Docker and systemd secrets).
4. Every field has a unit in its name or text, a default (or is required), a range and a sentence;
   README's settings table is these fields (tests/contract/test_settings.py).
5. `auto` is a value that depends on the device. Only the engine sees that, so only it resolves them
   (worker/engine/startup.py); the text says to what.

Size: a field a variable, each with its sentence and range; README's table is made of them.

Called by: each `__main__` and `create_app`, once; slices are passed down from there.
`python -m headrace.contract.settings` prints the table of README.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from headrace.contract.errors import ConfigurationError

PREFIX = "HEADRACE_"


class Settings(BaseModel):
    """Base of the settings classes: frozen, no unknown fields, built by `from_env`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
    registry: ClassVar[list[type[Settings]]] = []

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)  # type: ignore[arg-type]
        Settings.registry.append(cls)

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Self:
        """Build the settings from `HEADRACE_*` variables, or say in one text what is wrong."""
        given = _read_secret_files(environ)
        known = {_variable(name) for other in Settings.registry for name in other.model_fields}
        unknown = sorted(set(given) - known)
        if unknown:
            raise ConfigurationError(
                f"environment has {', '.join(unknown)}; headrace knows no such setting: "
                "correct the name (README lists them) or unset it"
            )
        values = {
            name: given[_variable(name)] for name in cls.model_fields if _variable(name) in given
        }
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = [
                f"{_variable(str(e['loc'][0]) if e['loc'] else '?')}: {e['msg']}"
                for e in error.errors(include_input=False, include_url=False)
            ]
            raise ConfigurationError("settings refused: " + "; ".join(lines)) from None

    def to_env(self) -> dict[str, str]:
        """Return the variables that make a child process read these same values."""
        values: dict[str, str] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, SecretStr):
                value = value.get_secret_value()
            if value is not None:
                values[_variable(name)] = str(value)
        return values


def _variable(field: str) -> str:
    return PREFIX + field.upper()


def _read_secret_files(environ: Mapping[str, str]) -> dict[str, str]:
    given = {k: v for k, v in environ.items() if k.startswith(PREFIX)}
    for variable in [k for k in given if k.endswith("_FILE")]:
        path = Path(given.pop(variable))
        plain = variable.removesuffix("_FILE")
        if plain in given:
            raise ConfigurationError(f"environment has {plain} and {variable}: keep one of them")
        try:
            given[plain] = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise ConfigurationError(
                f"{variable} names {path}; it cannot be read ({why}): correct the path"
            ) from None
    return given


def _begins_with(*schemes: str) -> Callable[[SecretStr], SecretStr]:
    def check(value: SecretStr) -> SecretStr:
        if not value.get_secret_value().startswith(schemes):
            raise ValueError(f"an address must begin with {' or '.join(schemes)}")
        return value

    return check


def _is_address(value: str) -> str:
    """Check `host:port`; empty means none."""
    host, _, port = value.rpartition(":")
    if value and not (host and port.isascii() and port.isdigit() and int(port) < 65_536):
        raise ValueError("an address is HOST:PORT, as 127.0.0.1:9464, or empty for none")
    return value


#: Where Prometheus finds a process that serves no HTTP otherwise.
MetricsBind = Annotated[
    str,
    AfterValidator(_is_address),
    Field(description="Address of the worker's, or the tasks', own /metrics; empty: none."),
]


def _is_collector(value: str) -> str:
    if value and not value.startswith(("http://", "https://")):
        raise ValueError("an address must begin with http:// or https://, or be empty")
    return value


class StoreSettings(Settings):
    """Where Redis and Postgres are: what every process but the engine needs."""

    redis_url: Annotated[
        SecretStr,
        AfterValidator(_begins_with("redis://", "rediss://", "unix://")),
        Field(description="Redis or Valkey >= 7.0, `redis://[:password@]host:port/0`."),
    ]
    database_url: Annotated[
        SecretStr,
        AfterValidator(_begins_with("postgresql+psycopg://")),
        Field(description="Postgres >= 14, `postgresql+psycopg://user:password@host:port/name`."),
    ]
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"],
        Field(description="Least severe log line that is written."),
    ] = "INFO"
    log_format: Annotated[
        Literal["text", "json"], Field(description="Log lines: `key=value`, or one JSON object.")
    ] = "text"
    lease_s: Annotated[
        float,
        Field(gt=0, le=600, description="A worker silent for this long loses its jobs, seconds."),
    ] = 10.0


class TracedSettings(StoreSettings):
    """What the processes on a job's way need to tell of it."""

    traces_url: Annotated[
        str,
        AfterValidator(_is_collector),
        Field(description="OTLP/HTTP collector of traces, as http://host:4318; empty: no traces."),
    ] = ""
    traces_share: Annotated[
        float,
        Field(ge=0, le=1, description="Traces begun here: of requests without a `traceparent`."),
    ] = 1.0


class GatewaySettings(TracedSettings):
    """The gateway's own settings."""

    bind: Annotated[str, Field(description="Address the HTTP server listens on.")] = (
        "127.0.0.1:8080"
    )
    gateway_processes: Annotated[
        int, Field(ge=1, le=64, description="gunicorn worker processes.")
    ] = 1
    max_connections: Annotated[
        int, Field(ge=10, le=100_000, description="Open connections (and streams) a process holds.")
    ] = 12_000
    max_body_bytes: Annotated[
        int, Field(ge=1_024, le=1 << 30, description="Largest request body, bytes.")
    ] = 4 << 20
    body_timeout_s: Annotated[
        float, Field(gt=0, le=3600, description="A request's body must be here in so long, s.")
    ] = 30.0
    max_json_depth: Annotated[
        int, Field(ge=4, le=200, description="Deepest nesting of a JSON body, levels.")
    ] = 32
    max_wait_s: Annotated[
        int, Field(ge=0, le=600, description="Longest `Prefer: wait=N` that is honoured, seconds.")
    ] = 60
    heartbeat_s: Annotated[
        float,
        Field(gt=0, le=120, description="Comment line on a silent event stream, every seconds."),
    ] = 10.0
    write_timeout_s: Annotated[
        float,
        Field(
            gt=0,
            le=3600,
            description="An event stream whose client takes nothing for this long is cut off, s.",
        ),
    ] = 30.0
    behind_proxy: Annotated[
        bool,
        Field(
            description="A proxy in front is believed on who asks, and whether by https "
            "(X-Forwarded-For, -Proto: it must set both)."
        ),
    ] = False
    max_queued_jobs: Annotated[
        int,
        Field(
            ge=0,
            le=1 << 40,
            description="Jobs of a model that may wait; more get 429 (batch: at 80 %); 0: any.",
        ),
    ] = 100_000
    max_queued_tokens: Annotated[
        int,
        Field(
            ge=0,
            le=1 << 50,
            description="The same of tokens, prompt and max_tokens; 0: any.",
        ),
    ] = 100_000_000
    max_queued_jobs_per_tenant: Annotated[
        int,
        Field(
            ge=0,
            le=1 << 40,
            description="Jobs of one tenant that may wait for a model; 0: any.",
        ),
    ] = 0
    db_pool_size: Annotated[
        int,
        Field(
            ge=1,
            le=200,
            description="Postgres connections a gateway process keeps; a request waits up to 20 s"
            " for one.",
        ),
    ] = 16


#: A number, or `auto`: the engine's choice for its device.
Auto = Literal["auto"]


class WorkerSettings(TracedSettings):
    """Courier and engine of one worker."""

    model: Annotated[
        str,
        Field(description="Folder of the model in `transformers` format; empty: the embedded one."),
    ] = ""
    model_name: Annotated[
        str, Field(description="Name clients ask for; empty: the folder's name.")
    ] = ""
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Field(description="Where the model runs; auto: on a GPU if there is one, else on the CPU."),
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(description="Weights and KV cache; auto: bfloat16 on a GPU, float32 on a CPU."),
    ] = "auto"
    kv_dtype: Annotated[
        Literal["auto", "fp8"],
        Field(description="KV cache; auto: as `dtype`, fp8: half of bfloat16's memory (GPU only)."),
    ] = "auto"
    weights_dtype: Annotated[
        Literal["auto", "fp8"],
        Field(description="Linear layers; auto: as `dtype`, fp8: W8A8 (GPU only)."),
    ] = "auto"
    gpu_memory_fraction: Annotated[
        float,
        Field(ge=0.1, le=0.98, description="Share of a GPU's memory the engine may take in all."),
    ] = 0.92
    engine_threads: Annotated[
        int,
        Field(ge=0, le=256, description="CPU threads of the engine; 0: half the cores it may use."),
    ] = 0
    kv_cache_mb: Annotated[
        Auto | Annotated[int, Field(ge=1, le=4_000_000)],
        Field(description="Memory of the KV pool, MiB; auto: a GPU's free share, 1024 on a CPU."),
    ] = "auto"
    block_size: Annotated[
        int,
        Field(ge=8, le=256, description="Tokens in one KV block (a power of two; a GPU: from 16)."),
    ] = 64
    max_seq_tokens: Annotated[
        int,
        Field(ge=0, le=1 << 20, description="Longest prompt + output, tokens; 0: the model's own."),
    ] = 0
    max_num_seqs: Annotated[
        Auto | Annotated[int, Field(ge=1, le=4096)],
        Field(description="Sequences running at once; auto: 256 on a GPU (max 1024), 64 on a CPU."),
    ] = "auto"
    max_step_tokens: Annotated[
        Auto | Annotated[int, Field(ge=16, le=65_536)],
        Field(description="Tokens computed in one step; auto: 8192 on a GPU, 512 on a CPU."),
    ] = "auto"
    target_step_ms: Annotated[
        Auto | Annotated[float, Field(ge=0, le=10_000)],
        Field(
            description="Prompts are cut so that a step of running streams keeps this, ms; 0: off; "
            "auto: 50 on a GPU, off on a CPU."
        ),
    ] = "auto"
    flush_ms: Annotated[
        float,
        Field(ge=0, le=1000, description="Tokens are logged and published at most this late, ms."),
    ] = 20.0
    drain_s: Annotated[
        float,
        Field(ge=0, le=3600, description="After SIGTERM or a drain running jobs have so long, s."),
    ] = 30.0
    step_timeout_s: Annotated[
        float,
        Field(gt=0, le=3600, description="An engine with work and no step for this long is ended."),
    ] = 30.0
    worker_id: Annotated[
        str, Field(description="Name of this worker; empty: host name and a random part.")
    ] = ""
    metrics_bind: MetricsBind = ""
    runner: Annotated[
        Literal["model", "stub"],
        Field(description="stub: tokens from a pure function, no model (fault tests)."),
    ] = "model"
    stub_step_ms: Annotated[
        float, Field(ge=0, le=10_000, description="How long a step of the stub takes, ms.")
    ] = 0.0
    stub_lost_steps: Annotated[
        int,
        Field(
            ge=0, le=1 << 30, description="A stub's device is lost after so many steps; 0: never."
        ),
    ] = 0
    stub_poison: Annotated[
        int,
        Field(
            ge=0,
            le=1 << 30,
            description="Token id; a prompt that holds it kills a stub's engine; 0: none.",
        ),
    ] = 0
    stub_broken_by: Annotated[
        str, Field(description="A file; while it exists every step kills a stub's engine.")
    ] = ""


class TasksSettings(StoreSettings):
    """Relay, sweeper, deadlines and retention (Celery)."""

    relay_every_s: Annotated[
        float, Field(gt=0, le=60, description="Outbox relay: every seconds.")
    ] = 1.0
    sweep_every_s: Annotated[
        float, Field(gt=0, le=600, description="Sweeper and deadlines: every seconds.")
    ] = 2.0
    oldest_job_target_s: Annotated[
        float,
        Field(gt=0, le=604_800, description="A job that waits longer raises an alarm, seconds."),
    ] = 60.0
    retention_days: Annotated[
        int, Field(ge=1, le=3650, description="Ended jobs are deleted after so many days.")
    ] = 30
    metrics_bind: MetricsBind = ""


class FleetSettings(Settings):
    """`headrace up` and the CLI: where the embedded parts live and where the API is."""

    redis_url: Annotated[
        SecretStr, Field(description="A Redis to use; empty: `up` starts an embedded Valkey.")
    ] = SecretStr("")
    database_url: Annotated[
        SecretStr, Field(description="A Postgres to use; empty: `up` starts an embedded one.")
    ] = SecretStr("")
    data_dir: Annotated[
        str, Field(description="Folder of the embedded servers' data, the model and the logs.")
    ] = ".data"
    port: Annotated[
        int, Field(ge=0, le=65_535, description="Port of the API that `up` starts; 0: a free one.")
    ] = 8080
    api_url: Annotated[
        str, Field(description="API the CLI talks to; empty: the fleet of the data folder.")
    ] = ""
    api_key: Annotated[
        SecretStr, Field(description="Key the CLI sends; empty: the one of the data folder.")
    ] = SecretStr("")


def table() -> str:
    """Return README's settings table: one row a variable, with the services that read it."""
    rows = ["| variable | default | what it is | read by |", "|---|---|---|---|"]
    for variable, uses in sorted(_uses().items()):
        field = uses[0][1]
        services = ", ".join(service for service, _ in uses)
        rows.append(f"| `{variable}` | {_default_of(field)} | {field.description} | {services} |")
    return "\n".join(rows)


def _uses() -> dict[str, list[tuple[str, FieldInfo]]]:
    # FleetSettings last: where it shares a variable, the services' own words describe it.
    found: dict[str, list[tuple[str, FieldInfo]]] = {}
    for cls in (GatewaySettings, WorkerSettings, TasksSettings, FleetSettings):
        service = cls.__name__.removesuffix("Settings").lower()
        for name, field in cls.model_fields.items():
            found.setdefault(_variable(name), []).append((service, field))
    return found


def _default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    return f"`{value}`" if value != "" else "empty"


if __name__ == "__main__":
    print(table())
