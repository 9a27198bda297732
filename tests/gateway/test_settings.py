"""Settings: what is read, what wins, and how each mistake is named."""

import os
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from gateway.settings import PackageSettings, PriceSettings, Settings, SettingsInvalid, UpstreamSettings, load

EXAMPLE = Path(__file__).resolve().parents[2] / "farebox.example.toml"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("FAREBOX_", "OPENAI_")):
            monkeypatch.delenv(name)


def problems(tmp_path: Path, toml: str) -> str:
    """What is said of a file; each test names the place and the reason that it must hold."""
    path = tmp_path / "farebox.toml"
    path.write_text(toml)
    with pytest.raises(SettingsInvalid) as caught:
        load(path)
    assert caught.value.exit_code == 2
    return str(caught.value)


def settings(tmp_path: Path, toml: str) -> Settings:
    path = tmp_path / "farebox.toml"
    path.write_text(toml)
    return load(path)


UPSTREAM = '[[upstreams]]\nname = "one"\nbase_url = "http://127.0.0.1:1/v1"\n'
PACKAGE = "[[packages]]\nid = 'a'\nprice = '{}'\n"


def test_the_defaults_are_those_of_the_public_contract():
    defaults = load()
    assert (defaults.database_url, defaults.redis_url) == ("sqlite:///farebox.db", None)
    assert (defaults.host, defaults.port, defaults.workers) == ("127.0.0.1", 8080, 1)
    assert (defaults.user_header, defaults.rate_limit_per_minute) == ("X-Quota-User", 100)
    assert defaults.body_bytes_max == 32 * 1024 * 1024
    assert (defaults.markup_bps, defaults.count_margin_bps) == (0, 100)
    assert (defaults.on_disconnect, defaults.on_disconnect_hidden_reasoning) == ("cancel", "drain")
    assert (defaults.drain_timeout_s, defaults.shutdown_grace_s) == (60, 30)
    assert (defaults.reservation_life_s, defaults.heartbeat_s, defaults.first_slice_tokens) == (120, 40, 256)
    assert (defaults.test_upstream, defaults.live_upstream, defaults.upstreams) == ("simulated", None, ())
    upstream = UpstreamSettings(name="x", base_url="http://127.0.0.1/v1")
    assert (upstream.connect_timeout_s, upstream.first_byte_timeout_s, upstream.idle_timeout_s) == (5, 120, 60)
    assert (upstream.retries, upstream.stream_usage) == (1, True)


def test_the_example_file_names_every_setting_with_its_default(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-from-environment")
    example = load(EXAMPLE)
    defaults = Settings()
    shown = {"upstreams", "models", "actions"}
    for name in Settings.model_fields.keys() - shown:
        assert getattr(example, name) == getattr(defaults, name), name
    text = EXAMPLE.read_text()
    for section in (Settings, UpstreamSettings, PriceSettings, PackageSettings):
        for name in section.model_fields.keys() - shown - {"packages"}:
            assert re.search(rf"^(# )?{name} = ", text, re.MULTILINE), name
    openai = example.upstreams[0]
    assert openai.api_key is not None
    assert openai.api_key.get_secret_value() == "sk-from-environment"
    assert example.models[0].fallbacks[0].upstream == "backup"
    assert example.models[0].price == PriceSettings(input="0.15", output="0.60", cached_input="0.075")
    assert (example.actions[0].key, example.actions[0].credits) == ("chat.reply", "4")


def test_the_environment_beats_the_file_beats_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAREBOX_PORT", "9001")
    monkeypatch.setenv("FAREBOX_LOG_LEVEL", "DEBUG")
    found = settings(tmp_path, 'port = 9000\nhost = "127.0.0.2"')
    assert (found.port, found.host, found.workers, found.log_level) == (9001, "127.0.0.2", 1, "debug")


def test_the_file_can_be_named_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "farebox.toml"
    path.write_text("port = 9000")
    monkeypatch.setenv("FAREBOX_CONFIG", str(path))
    assert load().port == 9000


def test_a_list_in_the_environment_is_json(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAREBOX_UPSTREAMS", '[{"name": "one", "base_url": "http://127.0.0.1:1/v1/"}]')
    assert [(upstream.name, upstream.base_url) for upstream in load().upstreams] == [("one", "http://127.0.0.1:1/v1")]
    monkeypatch.setenv("FAREBOX_UPSTREAMS", "one")
    with pytest.raises(SettingsInvalid, match="JSON"):
        load()


def test_a_secret_can_stand_in_a_file(tmp_path: Path):
    """Which is how container platforms hand secrets in: the file's last line break is not part of it."""
    (tmp_path / "url").write_text("postgresql://gateway:hunter2@db/farebox\n")
    (tmp_path / "key").write_text("sk-123\n")
    found = settings(
        tmp_path, f'database_url = "file:{tmp_path}/url"\n' + UPSTREAM + f'api_key = "file:{tmp_path}/key"\n'
    )
    assert found.database_url == "postgresql://gateway:hunter2@db/farebox"
    assert found.upstreams[0].api_key is not None
    assert found.upstreams[0].api_key.get_secret_value() == "sk-123"


def test_a_secret_can_stand_in_another_variable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DATABASE_URL", "postgresql://db/farebox")
    monkeypatch.setenv("FAREBOX_DATABASE_URL", "env:DATABASE_URL")
    monkeypatch.setenv("FAREBOX_REDIS_URL", "env:REDIS_URL")
    monkeypatch.setenv("REDIS_URL", "redis://cache/0")
    assert (load().database_url, load().redis_url) == ("postgresql://db/farebox", "redis://cache/0")


def test_a_secret_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAREBOX_DATABASE_URL", f"file:{tmp_path}/gone")
    with pytest.raises(SettingsInvalid, match=r"FAREBOX_DATABASE_URL: .*gone cannot be read: No such file"):
        load()
    (tmp_path / "bytes").write_bytes(b"\xff")
    monkeypatch.setenv("FAREBOX_DATABASE_URL", f"file:{tmp_path}/bytes")
    with pytest.raises(SettingsInvalid, match="is not a text"):
        load()


def test_an_openai_key_alone_is_enough_to_forward_to_openai(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-123")
    found = load()
    assert [(upstream.name, upstream.base_url) for upstream in found.upstreams] == [
        ("openai", "https://api.openai.com/v1")
    ]
    assert found.live_upstream == "openai"
    assert found.upstreams[0].max_tokens_field == "max_completion_tokens"


def test_an_empty_openai_key_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "")
    assert load().upstreams == ()


def test_a_named_upstream_is_not_joined_by_openai(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-123")
    assert [upstream.name for upstream in settings(tmp_path, UPSTREAM).upstreams] == ["one"]


@pytest.mark.parametrize(
    ("base_url", "field"),
    [
        ("https://api.openai.com/v1", "max_completion_tokens"),
        ("https://me.openai.azure.com/openai/v1", "max_completion_tokens"),
        ("http://127.0.0.1:11434/v1", "max_tokens"),
    ],
)
def test_output_is_limited_in_the_field_that_the_host_knows(base_url: str, field: str):
    assert UpstreamSettings(name="x", base_url=base_url).max_tokens_field == field
    chosen = UpstreamSettings(name="x", base_url=base_url, max_tokens_field="max_tokens")
    assert chosen.max_tokens_field == "max_tokens"


def test_no_secret_is_in_a_repr_or_in_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAREBOX_STRIPE_SECRET_KEY", "sk_live_secret")
    monkeypatch.setenv("FAREBOX_STRIPE_WEBHOOK_SECRET", "whsec_secret")
    monkeypatch.setenv("FAREBOX_DATABASE_URL", "postgresql://user:secret@127.0.0.1/farebox")
    found = settings(tmp_path, UPSTREAM + 'api_key = "very-secret"\nheaders = { "api-key" = "also-secret" }')
    assert "secret" not in repr(found).replace("stripe_secret_key", "").replace("stripe_webhook_secret", "")
    monkeypatch.setenv("FAREBOX_DATABASE_URL", "mysql://user:secret@127.0.0.1/farebox")
    assert "secret@" not in problems(tmp_path, UPSTREAM + 'api_key = "very\\nsecret"')


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("prot = 1", 'farebox.toml has the unknown key "prot"; did you mean "port"?'),
        (UPSTREAM + 'apikey = "x"', 'upstreams[0] has the unknown key "apikey"; did you mean "api_key"?'),
        (
            UPSTREAM + '[[models]]\nname = "m"\n[models.price]\ninput = "1"\noutput = "1"\ncached = "1"',
            'models[0].price has the unknown key "cached"',
        ),
        ("port = 70000", "port: input should be less than or equal to 65535"),
        ("rate_limit_per_minute = -1", "rate_limit_per_minute: input should be greater than or equal to 0"),
        ("markup_bps = 1000001", "markup_bps: input should be less than"),
        ('on_disconnect = "refund"', "on_disconnect: input should be 'cancel' or 'drain'"),
        ('user_header = "X Quota"', "user_header has characters that it may not have"),
        ('database_url = "mysql://x"', "database_url: it must begin with sqlite:///"),
        ('database_url = "sqlite:///:memory:"', "database_url: credits in memory would be lost"),
        ("heartbeat_s = 100", "heartbeat_s must be at most half of reservation_life_s"),
        ("drain_timeout_s = inf", "drain_timeout_s: input should be"),
        ('[[upstreams]]\nname = "one"', "upstreams[0].base_url is missing"),
        ('[[upstreams]]\nname = "one"\nbase_url = "ftp://x"', "upstreams[0].base_url: it must be a URL"),
        ('[[upstreams]]\nname = "one"\nbase_url = "http://u:p@h/"', "upstreams[0].base_url: it must have no user"),
        ('[[upstreams]]\nname = "simulated"\nbase_url = "http://h"', 'upstreams[0].name: "simulated" is the built-in'),
        ('[[upstreams]]\nname = "a/b"\nbase_url = "http://h"', "upstreams[0].name has characters"),
        (UPSTREAM + 'api_key = "env:NO_SUCH_KEY"', "upstreams[0].api_key: the environment variable NO_SUCH_KEY is not"),
        (UPSTREAM + 'api_key = ""', "upstreams[0].api_key: it is empty"),
        (UPSTREAM + UPSTREAM, 'the upstream "one" is listed more than once'),
        ('test_upstream = "two"', 'test_upstream names the upstream "two", but there is none; known: simulated'),
        (UPSTREAM + '[[models]]\nname = "m"\nupstream = "two"', 'the model "m" names the upstream "two"'),
        (UPSTREAM + '[[models]]\nname = "m"\nfallbacks = ["two/m"]', 'a fallback of "m" names the upstream "two"'),
        (
            UPSTREAM + '[[models]]\nname = "m"\nfallbacks = ["m"]',
            'models[0].fallbacks[0]: write it as "upstream/model"',
        ),
        ('[[models]]\nname = "m"', 'the model "m" has no upstream'),
        (UPSTREAM + '[[models]]\nname = "m"\n[models.price]\ninput = "1"', "models[0].price.output is missing"),
        ("[[actions]]\nkey = 'a'\ncredits = 0.1", 'actions[0].credits: write it as a string, "0.15"'),
        ("[[actions]]\nkey = 'a'\ncredits = '-1'", "actions[0].credits: '-1' is not a plain decimal"),
        ("[[actions]]\nkey = 'a'\ncredits = 'NaN'", "actions[0].credits: 'NaN' is not a plain decimal"),
        ("[[actions]]\nkey = 'a'\ncredits = '1e9'", "actions[0].credits: '1e9' is not a plain decimal"),
        ("[[actions]]\nkey = 'a'\ncredits = 'four'", "actions[0].credits: 'four' is not a decimal"),
        ("port = ", "is not valid TOML"),
        ('database_url = "postgresql://u@h:x/d"', "database_url: the port in it is not a number"),
        ('database_url = "postgresql://[::1/d"', "database_url: "),
        ('stripe_secret_key = "sk_test_a"', "stripe_secret_key is set and stripe_webhook_secret is not"),
        ('stripe_webhook_secret = "whsec_a"', "stripe_webhook_secret is set and stripe_secret_key is not"),
        ('stripe_secret_key = "whsec_a"', "stripe_secret_key: it must be a secret or restricted key of Stripe"),
        ('stripe_secret_key = "pk_live_a"', "stripe_secret_key: it must be a secret or restricted key of Stripe"),
        ('stripe_webhook_secret = "sk_test_a"', "stripe_webhook_secret: it must be the signing secret"),
        (PACKAGE.format("0"), 'the price of the package "a" must be above zero'),
        (PACKAGE.format("1.001"), 'the price of the package "a" must be above zero, with at most 2 decimal places'),
        (PACKAGE.format("1") + "currency = 'eur'", 'the package "a" is not in dollars: say what its credits are worth'),
        (PACKAGE.format("1") + "worth = '0'", 'the package "a" brings no credits'),
        (PACKAGE.format("1") + PACKAGE.format("2"), 'the package "a" is listed more than once'),
        (PACKAGE.format("1") + "prize = '2'", 'packages[0] has the unknown key "prize"; did you mean "price"?'),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path: Path, toml: str, said: str):
    assert said in problems(tmp_path, toml)


@pytest.mark.parametrize("setting", ["database_url = 'postgresql", "redis_url = 'redis"])
@pytest.mark.parametrize("password", ["hun/ter2", "hun#ter2", "hun?ter2", "1/hunter2", "1?hunter2", "1#hunter2"])
def test_a_password_that_breaks_its_url_is_told_and_not_quoted(tmp_path: Path, setting: str, password: str):
    said = problems(tmp_path, f"{setting}://user:{password}@127.0.0.1/0'")
    assert "%2F" in said
    assert "hun" not in said
    assert "ter2" not in said


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user@a:5432,b:5432/farebox?target_session_attrs=read-write",
        "postgresql://user:hun%2Fter2@[::1]:5432/farebox?sslmode=verify-full&sslrootcert=/etc/ca.pem",
        "postgresql://user@[::1]/farebox",
        "postgresql:///farebox?host=/run/postgresql&user=farebox@host",
    ],
)
def test_the_forms_of_a_servers_url(url: str):
    assert Settings(database_url=url).database_url == url


def test_a_mistake_in_the_environment_names_the_variable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAREBOX_PORT", "http")
    with pytest.raises(SettingsInvalid, match="FAREBOX_PORT: input should be a valid integer"):
        load()


def test_while_a_webhooks_secret_is_replaced_there_are_two():
    assert Settings(stripe_secret_key="rk_live_a", stripe_webhook_secret="whsec_a, whsec_b").stripe_webhook_secret


def test_mistakes_in_payments_are_told_beside_all_others(tmp_path: Path):
    said = problems(tmp_path, "stripe_secret_key = 'sk_test_a'\nheartbeat_s = 100\n" + PACKAGE.format("0"))
    assert all(place in said for place in ("stripe_webhook_secret is not", "heartbeat_s", 'the package "a"'))
    assert "sk_test" not in said


def test_all_mistakes_are_told_at_once(tmp_path: Path):
    said = problems(tmp_path, 'port = -1\nhost = 5\n[[upstreams]]\nname = "x"')
    assert all(place in said for place in ("port:", "host:", "upstreams[0].base_url"))
    assert "factory" not in said


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(SettingsInvalid, match=r"there is no file .*missing\.toml"):
        load(tmp_path / "missing.toml")


def test_settings_do_not_change_and_read_nothing_by_themselves(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAREBOX_PORT", "9001")
    found = Settings()
    assert found.port == 8080
    with pytest.raises(ValidationError):
        found.port = 1  # type: ignore[misc]


def test_the_demo_may_send_live_traffic_to_the_simulated_upstream():
    assert Settings(default_upstream="simulated").live_upstream == "simulated"
