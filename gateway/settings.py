"""The operator's settings: environment variables `FAREBOX_…` over a TOML file, every default in one place.

`load` is what reads the environment and the file; `Settings(...)` reads nothing and is what tests and the demo build.
A key that nobody knows, a reference to an upstream that is not there, a price that is not exact: all of them are
refused at once, together, in sentences that name the place. `farebox.example.toml` shows every setting.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from gateway.payments.packages import PackageInvalid, Packages

PREFIX: Final = "FAREBOX_"
SIMULATED: Final = "simulated"
"""The name of the built-in upstream; no other may have it."""

REDIS_OPTIONS: Final = frozenset({"ssl_ca_certs", "ssl_certfile", "ssl_keyfile"})
"""What may stand behind the question mark of a Redis URL: files for TLS."""

OPENAI_BASE_URL: Final = "https://api.openai.com/v1"
DECIMAL_LENGTH_MAX: Final = 60
MAX_TOKENS_OF_OPENAI: Final = ("api.openai.com", ".openai.azure.com")
"""Hosts whose newer models refuse `max_tokens`. Others often know only that one, and ignore what they do not know:
then a clamped request would not be clamped at all."""


class SettingsInvalid(Exception):
    """What is wrong with the settings: one sentence each, none with a secret in it."""

    exit_code: ClassVar[int] = 2

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(["The settings are not usable:", *(f"  - {problem}" for problem in self.problems)]))


def _exact_decimal(value: Any) -> Any:
    """A price or an amount: a whole number or a string, because a TOML float has lost digits before we see it."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError('write it as a string, "0.15", so that it stays exact')
    try:
        number = Decimal(value)
    except InvalidOperation:
        raise ValueError(f"{value[:DECIMAL_LENGTH_MAX]!r} is not a decimal number") from None
    if len(value) > DECIMAL_LENGTH_MAX or not re.fullmatch(r"[0-9]+(\.[0-9]+)?", value):
        raise ValueError(f"{value[:DECIMAL_LENGTH_MAX]!r} is not a plain decimal number of zero or more") from None
    return str(number)


def _secret(value: Any) -> Any:
    """`env:NAME` stands for the content of the environment variable NAME, and `file:PATH` for that of a file."""
    if isinstance(value, str) and value.startswith("env:"):
        name = value.removeprefix("env:")
        if not os.environ.get(name):
            raise ValueError(f"the environment variable {name} is not set")
        return os.environ[name]
    if isinstance(value, str) and value.startswith("file:"):
        path = Path(value.removeprefix("file:"))
        try:
            return path.read_text(encoding="utf-8").rstrip("\n")
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not a text") from None
    return value


def _require_server(url: str) -> None:
    """Refuse what no driver reads as it was meant, and what a driver would quote in its error, a password with it."""
    parts = urlsplit(url)
    escaped = "a character that means something in a URL, such as # / ? @ or %, is written as %23 %2F %3F %40 %25"
    if "@" in parts.path + parts.fragment or any("=" not in option for option in parts.query.split("&") if option):
        raise ValueError(f"it is no URL with a user, a host and options; in a password {escaped}")
    for host in parts.netloc.rpartition("@")[2].split(","):
        if (port := re.search(r":([^]:]*)$", host)) and not re.fullmatch(r"[0-9]{1,5}|", port[1]):
            raise ValueError(f"the port in it is not a number; in a password {escaped}")


def _header_safe(value: SecretStr) -> SecretStr:
    """A secret goes into a request header, where a line break would start another one."""
    if not re.fullmatch(r"[!-~]([ -~]*[!-~])?", value.get_secret_value()):
        raise ValueError("it is empty or has characters that no request header may have")
    return value


def _base_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("it must be a URL that begins with http:// or https://")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("it must have no user, password, query or fragment")
    return value.rstrip("/")


def _log_level(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _fallback(value: Any) -> Any:
    if isinstance(value, str):
        upstream, slash, model = value.partition("/")
        if not (upstream and slash and model):
            raise ValueError('write it as "upstream/model"')
        return {"upstream": upstream, "model": model}
    return value


ExactDecimal = Annotated[str, BeforeValidator(_exact_decimal)]
Secret = Annotated[SecretStr, BeforeValidator(_secret), AfterValidator(_header_safe)]
BaseURL = Annotated[str, AfterValidator(_base_url)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
ModelName = Annotated[str, Field(pattern=r"^[!-~]([ -~]{0,254}[!-~])?$")]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Tokens = Annotated[int, Field(ge=1, le=100_000_000)]
BasisPoints = Annotated[int, Field(ge=0, le=1_000_000)]
OnDisconnect = Literal["cancel", "drain"]
MaxTokensField = Literal["max_tokens", "max_completion_tokens"]
LogLevel = Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_log_level)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


def _max_tokens_field(data: Mapping[str, Any]) -> MaxTokensField:
    host = urlsplit(data.get("base_url", "")).hostname or ""
    return "max_completion_tokens" if host.endswith(MAX_TOKENS_OF_OPENAI) else "max_tokens"


class UpstreamSettings(Section):
    """One OpenAI-compatible server.

    `max_tokens_field` is the field in which we lower a request's output when the client sent none: by default
    `max_completion_tokens` for OpenAI and Azure, whose newer models refuse the old name, and `max_tokens`
    for all others.
    `provider` says whose published prices apply when a model's name alone does not.
    """

    name: Name
    base_url: BaseURL
    api_key: Secret | None = None
    headers: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,64}$")], Secret] = {}
    provider: Name | None = None
    stream_usage: bool = True
    max_tokens_field: MaxTokensField = Field(default_factory=_max_tokens_field)
    connect_timeout_s: Seconds = 5
    first_byte_timeout_s: Seconds = 120
    idle_timeout_s: Seconds = 60
    retries: int = Field(default=1, ge=0, le=5)

    @field_validator("name")
    @classmethod
    def _not_built_in(cls, name: str) -> str:
        if name == SIMULATED:
            raise ValueError(f'"{SIMULATED}" is the built-in upstream; choose another name')
        return name


class PriceSettings(Section):
    """A model's price in dollars per million tokens; `image` and `request` in dollars each. All exact decimals."""

    input: ExactDecimal
    output: ExactDecimal
    cached_input: ExactDecimal | None = None
    cache_write: ExactDecimal | None = None
    reasoning: ExactDecimal | None = None
    input_audio: ExactDecimal | None = None
    output_audio: ExactDecimal | None = None
    image: ExactDecimal | None = None
    request: ExactDecimal | None = None


class Fallback(Section):
    upstream: str
    model: ModelName


class ModelSettings(Section):
    """What clients ask for by `name`, and where it goes. Without an upstream it goes to the default one."""

    name: ModelName
    upstream: str | None = None
    upstream_model: ModelName | None = None
    fallbacks: tuple[Annotated[Fallback, BeforeValidator(_fallback)], ...] = ()
    price: PriceSettings | None = None
    max_output_tokens: Tokens | None = None
    context_window: Tokens | None = None
    hidden_reasoning: bool | None = None

    @property
    def described(self) -> bool:
        """Whether the operator gives this name a price or a limit of its own."""
        own = (self.price, self.max_output_tokens, self.context_window, self.hidden_reasoning)
        return any(value is not None for value in own)


class ActionSettings(Section):
    """A product action (`X-Quota-Action: KEY`) with a fixed price in credits, whatever its tokens."""

    key: Name
    credits: ExactDecimal


class PackageSettings(Section):
    """What customers can buy: *price* in *currency*, for credits worth *worth* dollars, and *bonus* dollars on top.

    The worth is the price unless it is said; for another currency than the dollar it has to be.
    """

    id: Name
    price: ExactDecimal
    currency: Annotated[str, Field(pattern=r"^[a-z]{3}$")] = "usd"
    worth: ExactDecimal | None = None
    bonus: ExactDecimal = "0"


DEFAULT_PACKAGES: Final = tuple(PackageSettings(id=f"usd-{price}", price=str(price)) for price in (5, 10, 25, 50))


class Settings(BaseSettings):
    """All settings, frozen. Fields that hold a password are kept out of the repr."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, env_prefix=PREFIX, validate_default=False
    )

    database_url: Annotated[str, BeforeValidator(_secret)] = Field(default="sqlite:///farebox.db", repr=False)
    redis_url: Annotated[str | None, BeforeValidator(_secret)] = Field(default=None, repr=False)
    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65_535)
    workers: int = Field(default=1, ge=1, le=256)
    public_url: BaseURL | None = None
    log_level: LogLevel = "info"
    access_log: bool = False
    otlp_endpoint: BaseURL | None = None

    stripe_secret_key: Secret | None = None
    stripe_webhook_secret: Secret | None = None
    stripe_api_base: BaseURL | None = None
    packages: tuple[PackageSettings, ...] = DEFAULT_PACKAGES

    user_header: str = Field(default="X-Quota-User", pattern=r"^[A-Za-z0-9-]{1,64}$")
    rate_limit_per_minute: int = Field(default=100, ge=0, le=1_000_000)
    management_rate_limit_per_minute: int = Field(default=6_000, ge=0, le=1_000_000)
    body_bytes_max: int = Field(default=32 * 2**20, ge=1024, le=2**30)

    webhooks_allow_private: bool = False

    markup_bps: BasisPoints = 0
    on_disconnect: OnDisconnect = "cancel"
    on_disconnect_hidden_reasoning: OnDisconnect = "drain"
    drain_timeout_s: Seconds = 60
    count_margin_bps: BasisPoints = 100
    first_slice_tokens: Tokens = 256
    reservation_life_s: Seconds = 120
    heartbeat_s: Seconds = 40
    ledger_timeout_s: Seconds = 10
    drain_delay_s: float = Field(default=0, ge=0, le=3600, allow_inf_nan=False)
    shutdown_grace_s: Seconds = 30
    journal_dir: Path = Path("farebox-journal")

    default_upstream: str | None = None
    test_upstream: str = SIMULATED
    upstreams: tuple[UpstreamSettings, ...] = ()
    models: tuple[ModelSettings, ...] = ()
    actions: tuple[ActionSettings, ...] = ()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is passed in; `load` adds the environment and the file."""
        return (init_settings,)

    @field_validator("stripe_secret_key")
    @classmethod
    def _stripes_key(cls, key: SecretStr | None) -> SecretStr | None:
        if key is not None and not re.match(r"(sk|rk)_(live|test)_.", key.get_secret_value()):
            raise ValueError("it must be a secret or restricted key of Stripe: sk_live_…, sk_test_…, rk_…")
        return key

    @field_validator("stripe_webhook_secret")
    @classmethod
    def _stripes_secret(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is not None and not re.fullmatch(
            r"(whsec_[^,\s]+)(\s*,\s*whsec_[^,\s]+)*", secret.get_secret_value()
        ):
            raise ValueError(
                "it must be the signing secret of Stripe's webhook endpoint, whsec_…, or several with commas"
            )
        return secret

    @field_validator("redis_url")
    @classmethod
    def _known_redis(cls, url: str | None) -> str | None:
        if url is None:
            return None
        if not re.match(r"rediss?://.", url):
            raise ValueError("it must begin with redis:// or rediss://")
        _require_server(url)
        options = (option.partition("=")[0] for option in urlsplit(url).query.split("&"))
        unknown = sorted({option for option in options if option} - REDIS_OPTIONS)
        if unknown:
            raise ValueError(f"it has options that are not known here: {', '.join(unknown)}")
        return url

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, url: str) -> str:
        if not re.match(r"sqlite:///.|postgresql://.", url):
            raise ValueError("it must begin with sqlite:/// and a path, or with postgresql://")
        if ":memory:" in url:
            raise ValueError("credits in memory would be lost with the process: name a file")
        if not url.startswith("sqlite:"):
            _require_server(url)
        return url

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = [
            *self._repeated_names(),
            *self._unknown_upstreams(),
            *self._payments_half_set_up(),
            *self._unsellable_packages(),
        ]
        if self.heartbeat_s * 2 > self.reservation_life_s:
            problems.append(
                "heartbeat_s must be at most half of reservation_life_s, or a live request loses its credits"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _repeated_names(self) -> Iterable[str]:
        for kind, names in (
            ("upstream", [upstream.name for upstream in self.upstreams]),
            ("model", [model.name for model in self.models]),
            ("action", [action.key for action in self.actions]),
            ("package", [package.id for package in self.packages]),
        ):
            for name in sorted({name for name in names if names.count(name) > 1}):
                yield f'the {kind} "{name}" is listed more than once'

    def _unknown_upstreams(self) -> Iterable[str]:
        known = {SIMULATED, *(upstream.name for upstream in self.upstreams)}
        for place, name in (
            ("default_upstream", self.default_upstream),
            ("test_upstream", self.test_upstream),
            *((f'the model "{model.name}"', model.upstream) for model in self.models),
            *((f'a fallback of "{model.name}"', to.upstream) for model in self.models for to in model.fallbacks),
        ):
            if name is not None and name not in known:
                yield f'{place} names the upstream "{name}", but there is none; known: {", ".join(sorted(known))}'
        for model in self.models:
            if model.upstream is None and self.live_upstream is None:
                yield f'the model "{model.name}" has no upstream, and there is no other to take'

    def _payments_half_set_up(self) -> Iterable[str]:
        names = ("stripe_secret_key", "stripe_webhook_secret")
        for one, other in (names, names[::-1]):
            if getattr(self, one) is not None and getattr(self, other) is None:
                yield f"{one} is set and {other} is not: payments need both"

    def _unsellable_packages(self) -> Iterable[str]:
        for package in self.packages:
            try:
                Packages((package,))
            except PackageInvalid as error:
                yield str(error)

    @property
    def live_upstream(self) -> str | None:
        """Where live traffic goes unless a model says otherwise: the first upstream, or none when there is none."""
        return self.default_upstream or (self.upstreams[0].name if self.upstreams else None)


def moves_money(stripe_key: str) -> bool:
    """Whether it is a live key of Stripe's, rather than a test key."""
    return stripe_key.startswith(("sk_live_", "rk_live_"))


def load(config: Path | None = None) -> Settings:
    """The settings from the environment, over the TOML file *config* (or `FAREBOX_CONFIG`), over the defaults.

    With `OPENAI_API_KEY` set and no upstream named anywhere, there is one: OpenAI. OpenTelemetry's own variable for the
    collector's address, `OTEL_EXPORTER_OTLP_ENDPOINT`, stands for `otlp_endpoint`.

    Raises:
        SettingsInvalid: with all that is wrong, as far as it can be seen at once.
    """
    if config is None and (named := os.environ.get(f"{PREFIX}CONFIG")):
        config = Path(named)
    from_file = _read(config) if config is not None else {}
    if unknown := sorted(from_file.keys() - Settings.model_fields.keys()):
        raise SettingsInvalid(_unknown_key(str(config), key, Settings.model_fields) for key in unknown)
    try:
        from_environment = EnvSettingsSource(Settings, env_ignore_empty=True)()
    except SettingsError as error:
        raise SettingsInvalid([f"{error}: lists in the environment are written as JSON"]) from None
    values = {**from_file, **from_environment}
    if not values.get("otlp_endpoint") and (collector := os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")):
        values["otlp_endpoint"] = collector
    if not values.get("upstreams") and os.environ.get("OPENAI_API_KEY"):
        values["upstreams"] = [{"name": "openai", "base_url": OPENAI_BASE_URL, "api_key": "env:OPENAI_API_KEY"}]
    try:
        return Settings(**values)
    except ValidationError as error:
        source = {name: f"{PREFIX}{name.upper()}" for name in from_environment}
        raise SettingsInvalid(_sentences(error, source)) from None


def database_url(value: str, *, source: str) -> str:
    """A database's URL, read as the setting is; *source* is where it was given.

    Raises:
        SettingsInvalid
    """
    try:
        return Settings(database_url=value).database_url
    except ValidationError as error:
        raise SettingsInvalid(_sentences(error, {"database_url": source})) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsInvalid([f"there is no file {path}"]) from None
    except OSError as error:
        raise SettingsInvalid([f"{path} cannot be read: {error.strerror}"]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsInvalid([f"{path} is not valid TOML: {error}"]) from None


def _sentences(error: ValidationError, source: Mapping[str, str]) -> Iterable[str]:
    for problem in error.errors(include_url=False, include_input=False):
        place = _place(problem["loc"], source)
        match problem["type"]:
            case "extra_forbidden":
                *section, key = problem["loc"]
                yield _unknown_key(_place(tuple(section), source), str(key), _fields_at(section))
            case "missing":
                yield f"{place} is missing"
            case "default_factory_not_called":
                continue  # Its default hangs on another field, which is told by itself.
            case "value_error":
                yield from (f"{place}: {line}" if place else line for line in str(problem["ctx"]["error"]).splitlines())
            case "string_pattern_mismatch":
                yield f"{place} has characters that it may not have, or is too long"
            case _:
                yield f"{place}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _place(location: tuple[int | str, ...], source: Mapping[str, str]) -> str:
    """`upstreams[0].base_url`, or the environment variable that the value came from."""
    place = ""
    for step in location:
        place += f"[{step}]" if isinstance(step, int) else f".{step}" if place else source.get(step, step)
    return place


SECTIONS: Final[Mapping[str, type[Section]]] = {
    "upstreams": UpstreamSettings,
    "models": ModelSettings,
    "actions": ActionSettings,
    "packages": PackageSettings,
    "price": PriceSettings,
    "fallbacks": Fallback,
}


def _fields_at(section: list[int | str]) -> Iterable[str]:
    """The fields that a section may have; *section* is the way to it."""
    names = [step for step in section if step in SECTIONS]
    return SECTIONS[str(names[-1])].model_fields if names else Settings.model_fields


def _unknown_key(place: str, key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1)
    return f'{place} has the unknown key "{key}"' + (f'; did you mean "{near[0]}"?' if near else "")
