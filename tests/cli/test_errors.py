"""Error messages of every command line: one short line, whatever was given."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import pytest

from ldm.cli.parser import Parser, command, readable, run_command, settings_from
from ldm.io.errors import BadInput, SettingError, fault_of, flags_named
from tests.helpers.scripts import load_script

LONG = "n" * 5000
EMOJI64 = ("--config", "models/ldm/emoji64/config.yaml")


def test_what_is_long_in_a_message_is_cut_and_counted():
    assert readable("--ckpt: m.ckpt: no such file") == "--ckpt: m.ckpt: no such file"
    cut = f"{'n' * 133}...(5001 characters)...{'n' * 33}:"
    assert readable(f"--ckpt: {LONG}: no such file") == f"--ckpt: {cut} no such file"
    assert len(readable("many words " * 5000)) < 2100
    assert readable("a\nb\x1b[2J\x00c\u202e") == "a b?[2J?c?"  # nothing that moves a terminal's cursor


def test_a_command_prints_it(capsys):
    def run():
        raise BadInput(f"--plan: {LONG!r}")

    assert command("x.py", run) == 2
    error = capsys.readouterr().err
    assert error.startswith("x.py: error: --plan: 'nnn") and len(error) < 300 and error.count("\n") == 1


def test_a_fault_of_the_machine_is_no_traceback(tmp_path, capsys):
    assert command("x.py", lambda: (tmp_path / "no" / "file").write_text("x")) == 2
    assert "x.py: error: [Errno 2] No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "script, args",
    [
        ("doctor", [*EMOJI64, "--ckpt", LONG]),
        ("doctor", ["--config", LONG, "--ckpt", "m.ckpt"]),
        ("convert", [LONG, "--to", "ldm", "--out", "m.safetensors"]),
        ("convert", [LONG, "--to", "diffusers", "--out", "m", *EMOJI64]),
        ("convert", ["m.ckpt", "--to", "diffusers", "--out", LONG, *EMOJI64]),
        ("convert", ["m.ckpt", "--to", "diffusers", "--out", "m", "--config", LONG]),
        ("export_model", [LONG, "--out", "m.safetensors"]),
        ("export_model", [LONG, "--part", "a", "--out", "m"]),
        ("export_model", ["models/ldm/emoji64/model.safetensors", "--part", "model", "--out", LONG]),
        ("download_models", [LONG]),
        ("download_models", ["--manifest", LONG, "--list"]),
        ("download_models", ["--root", LONG, "--list"]),
        ("download_models", ["--root", LONG, "kl-f8"]),
    ],
)
def test_names_that_no_file_can_have(script, args, capsys):
    code = load_script(script).main(args)
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and len(error) < 1000, error


def test_a_setting_that_cant_be_used_is_told_as_the_commands_flag():
    for names, flag in (({}, "--steps"), ({"steps": "TABLE: a row: steps"}, "TABLE: a row: steps")):
        with pytest.raises(BadInput, match=f"^{flag}: too many, 9$"), flags_named(names), fault_of("steps"):
            raise ValueError("too many,\n9")
    with pytest.raises(SettingError, match="^plan: none$") as found, fault_of("steps"):  # the inner one knows better
        raise SettingError("plan", "none")
    assert (found.value.setting, found.value.problem) == ("plan", "none")


def test_other_settings_that_a_message_names_are_the_commands_flags_too(capsys):
    error = SettingError("steps", "{a}: not with {cut_off}", "cut_off").moved("steps", "of {cut}: ")
    assert str(error) == "steps: of {cut}: {a}: not with cut_off" and error.problem == "of {cut}: {a}: not with cut_off"

    def refused(_) -> None:
        raise error

    p = a_command()
    p.add_argument("--cut-off")
    assert run_command(p, refused, []) == 2
    assert capsys.readouterr().err == "x.py: error: --steps: of {cut}: {a}: not with --cut-off\n"
    with pytest.raises(BadInput, match="^--steps: .* not with THERE$"), flags_named({"cut_off": "THERE"}):
        raise error


def a_command() -> Parser:
    p = Parser(prog="x.py")
    p.add_argument("-c", "--custom_steps", "--steps", dest="steps", type=int, default=3)
    p.add_argument("-e", "--ddim_eta", dest="eta")
    p.add_argument("--C", dest="channels")
    p.add_argument("--guidance-interval")
    p.add_subparsers().add_parser("one").add_argument("--rows-below")
    return p


@pytest.mark.parametrize(
    "setting, flag",
    [
        ("steps", "--steps"),
        ("eta", "--ddim_eta"),
        ("channels", "--C"),
        ("guidance_interval", "--guidance-interval"),
        ("rows_below", "--rows-below"),
        ("models/published.yaml", "models/published.yaml"),
    ],
)
def test_a_command_names_its_own_flag_for_a_setting(setting, flag, capsys):
    def run(args: argparse.Namespace) -> None:
        raise SettingError(setting, "can't be")

    assert run_command(a_command(), run, []) == 2
    assert capsys.readouterr().err == f"x.py: error: {flag}: can't be\n"


@pytest.mark.parametrize("result, code", [(None, 0), (0, 0), (1, 1)])
def test_what_a_command_returns_is_its_exit_code(result, code):
    assert run_command(a_command(), lambda args: result, []) == code


def test_settings_are_the_arguments_of_their_fields_names():
    @dataclass(frozen=True)
    class Settings:
        steps: int
        eta: str | None
        sampler: str

    args = a_command().parse_args(["--steps", "7"])
    assert settings_from(args, Settings, sampler="plms") == Settings(7, None, "plms")
    with pytest.raises(AttributeError, match="sampler"):
        settings_from(args, Settings)
