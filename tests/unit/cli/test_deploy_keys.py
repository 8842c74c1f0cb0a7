"""The commands of keys, typed as an authority, a server and a site would."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from parablock.cli.deploy_keys import keys_app
from parablock.deploy.authority import load_credentials, read_request
from parablock.errors import ConfigError, InputError, StorageError

WORDS = "three words here"


def run(*arguments: object, typed: str = "") -> Result:
    return CliRunner().invoke(keys_app, [str(one) for one in arguments], input=typed)


def done(*arguments: object, typed: str = "") -> str:
    result = run(*arguments, typed=typed)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def refused(kind: type[Exception], told: str, *arguments: object, typed: str = "") -> None:
    result = run(*arguments, typed=typed)
    assert isinstance(result.exception, kind), result.output
    with pytest.raises(kind, match=told):
        raise result.exception


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The folder of an authority whose key is not encrypted."""
    done("authority", tmp_path / "authority", "--unencrypted")
    return tmp_path / "authority"


def test_the_whole_way_of_a_federation(tmp_path: Path):
    """Authority, requests, signatures, installation, renewal, revocation; the passphrase is typed."""
    place, answer = tmp_path / "authority", tmp_path / "answer"
    done("authority", place, typed=f"{WORDS}\n{WORDS}\n")
    for name, more, host in (("server", ["--host", "fl.example.org"], "fl.example.org"), ("site-3", [], "")):
        folder, file = tmp_path / name, f"{name.split('-')[0]}.csr"
        told = done("request", folder, "--name", name, *more)
        fingerprint = read_request(folder / file).fingerprint
        assert fingerprint in told and host in told and "No other machine" not in told
        told = done("sign", folder / file, "--authority", place, "--output-dir", answer, typed=f"{WORDS}\n")
        assert fingerprint in told and str(answer / f"{name}.pem") in told and WORDS not in told
        assert f"{name}, 364 days left" in done("install", folder, answer / f"{name}.pem")
        assert f"{name}: 364 days left" in done("show", folder)
    assert "hosts: fl.example.org, localhost" in done("show", tmp_path / "server")
    site = tmp_path / "site-3"
    key = (site / "site.key").read_bytes()
    done("request", site, "--name", "site-3")
    options = ("--authority", place, "--output-dir", answer)
    done("sign", site / "site.csr", *options, "--days", 30, typed=f"{WORDS}\n")
    assert "29 days left" in done("install", site, answer / "site-3.pem")
    assert (site / "site.key").read_bytes() == key
    told = done("revoke", "site-3", "--authority", place, typed=f"{WORDS}\n")
    assert len(re.findall(r"\b[0-9A-F]{30,}\b", told)) == 2 and "revoked.pem" in told
    assert "nothing is left to revoke" in done("revoke", "site-3", "--authority", place, typed=f"{WORDS}\n")
    states = [line.split()[:2] for line in done("show", place).splitlines()]
    assert states == [["server", "valid"], ["site-3", "revoked"], ["site-3", "revoked"]]


def test_a_passphrase_is_typed_twice_alike_and_never_shown(tmp_path: Path):
    told = done("authority", tmp_path / "a", typed=f"{WORDS}\nother\n{WORDS}\n{WORDS}\n")
    assert "do not match" in told and WORDS not in told
    assert run("authority", tmp_path / "b", typed="\n\n").exit_code == 1, "an empty one is asked for again"
    assert not (tmp_path / "b").exists()


def test_a_passphrase_comes_from_a_file_that_is_for_this_user_alone(tmp_path: Path):
    file, place = tmp_path / "words", tmp_path / "authority"
    file.write_text(WORDS + "\n")
    file.chmod(0o644)
    refused(StorageError, "has the mode 0644", "authority", place, "--passphrase-file", file)
    assert not place.exists()
    file.chmod(0o600)
    done("authority", place, "--passphrase-file", file)
    done("request", tmp_path / "site", "--name", "site-0")
    sign = ("sign", tmp_path / "site" / "site.csr", "--authority", place)
    refused(InputError, "cannot be opened with this passphrase", *sign, typed="other\n")
    done(*sign, "--passphrase-file", file)
    done(*sign, typed=f"{WORDS}\n")
    done("revoke", "site-0", "--authority", place, "--passphrase-file", file)
    file.write_text("\n")
    refused(InputError, "the passphrase is empty", "authority", tmp_path / "new", "--passphrase-file", file)


def test_a_trial_is_asked_for_no_passphrase_and_takes_none(tmp_path: Path, place: Path):
    file = tmp_path / "words"
    file.touch(mode=0o600)
    file.write_text(WORDS)
    both = ("authority", tmp_path / "b", "--unencrypted", "--passphrase-file", file)
    refused(ConfigError, "not both", *both)
    done("request", tmp_path / "site", "--name", "site-0")
    sign = ("sign", tmp_path / "site" / "site.csr", "--authority", place)
    refused(InputError, "is not encrypted", *sign, "--passphrase-file", file)
    done(*sign)


def test_what_serves_one_machine_or_a_trial_alone_says_so(tmp_path: Path):
    assert "No other machine can use it" in done("request", tmp_path / "server", "--name", "server")
    assert "a key without a passphrase" in done("--sites", 1, "--output-dir", tmp_path / "trial")
    refused(ConfigError, "without one give --passphrase-file FILE", "authority", tmp_path / "authority")


def test_another_key_for_a_name_needs_the_word(tmp_path: Path, place: Path):
    for folder in ("old", "new"):
        done("request", tmp_path / folder, "--name", "site-0")
    done("sign", tmp_path / "old" / "site.csr", "--authority", place)
    again = ("sign", tmp_path / "new" / "site.csr", "--authority", place)
    refused(InputError, "another key", *again)
    assert "Copy" in done(*again, "--replace")
    done("install", tmp_path / "new", tmp_path / "new" / "site-0.pem")
    assert load_credentials(tmp_path / "new").client_id == 0
    assert [line.split()[1] for line in done("show", place).splitlines()] == ["revoked", "valid"]


def test_nothing_secret_can_be_given_in_the_arguments(tmp_path: Path):
    for command in ("authority", "sign", "revoke"):
        assert "--passphrase-file" in done(command, "--help")
        assert not re.search(r"--passphrase(?!-file)", done(command, "--help"))
    assert run("authority", tmp_path / "a", "--passphrase", WORDS).exit_code == 2


def test_wrong_arguments_are_told(tmp_path: Path, place: Path):
    refused(InputError, "is not a name", "request", tmp_path / "site", "--name", "site3")
    refused(InputError, "has no certificate", "revoke", "site-3", "--authority", place)
    refused(InputError, "holds neither", "show", tmp_path / "gone")
    refused(StorageError, "holds authority.key already", "authority", place, "--unencrypted")
    assert run("sign", tmp_path / "site.csr", "--authority", place, "--days", 0).exit_code == 2


def test_each_command_has_examples_that_name_a_command_with_its_options():
    commands = {command.callback.__name__: command.callback for command in keys_app.registered_commands}
    assert set(commands) == {"authority", "request", "renew", "sign", "install", "revoke", "show"}
    for name, callback in commands.items():
        examples = re.findall(r"Example: parablock deploy keys (.+)", inspect.getdoc(callback) or "")
        assert examples
        for example in examples:
            command, *words = shlex.split(example)
            options = {word for word in words if word.startswith("--")}
            assert command == name and all(option in done(name, "--help") for option in options)
