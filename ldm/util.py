"""Build objects from the `target:` and `params:` of a config."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError, create_model

from ldm.io.files import first_error

ALLOWED_PACKAGES = ("ldm", "torch.nn", "torch.optim")
# Packages of published configs whose classes are ours under another name; the longest beginning counts.
RENAMED = {
    "taming.modules.losses": "ldm.modules.losses",
    "taming.data": "ldm.data",
    "main.DataModuleFromConfig": "ldm.training.datasets.DataModuleFromConfig",
    "sgm.models.autoencoder": "ldm.models.autoencoder",
    "sgm.models.autoencoder.AutoencoderKLInferenceWrapper": "ldm.models.autoencoder.AutoencoderKL",
    "sgm.modules.GeneralConditioner": "ldm.modules.encoders.modules.GeneralConditioner",
    "sgm.modules.encoders.modules": "ldm.modules.encoders.modules",
    "sgm.modules.diffusionmodules.openaimodel": "ldm.modules.diffusionmodules.openaimodel",
    "rdm.models.diffusion.ddpm": "ldm.models.diffusion.ddpm",
    "rdm.modules.diffusionmodules": "ldm.modules.diffusionmodules",
    "rdm.data.imagenet": "ldm.data.imagenet",
    "rdm.data.base.QueryDataset": "ldm.data.neighbours.QueryDataset",
    "rdm.data.faces.FFHQTrainRDM": "ldm.data.faceshq.FFHQTrain",
    "rdm.data.faces.FFHQValidationRDM": "ldm.data.faceshq.FFHQValidation",
}

PUBLISHED = ("count_params", "default", "exists", "isimage", "ismap", "log_txt_as_img", "mean_flat")


def __getattr__(name: str) -> Any:
    """The published helpers of this module. They need PyTorch, which is imported only when one of them is used."""
    if name in PUBLISHED:
        return getattr(import_module("ldm.compatibility"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class ConfigError(ValueError):
    """A config that does not describe an object of an allowed package."""


def inside(name: str, packages: Iterable[str]) -> bool:
    """Whether a dotted name is that of one of the packages, or of something in one."""
    return any(name == package or name.startswith(package + ".") for package in packages)


def _renamed(target: str) -> str:
    """The name under which a class of a published config is found here."""
    known = [package for package in RENAMED if inside(target, (package,))]
    if not known:
        return target
    longest = max(known, key=len)
    return RENAMED[longest] + target.removeprefix(longest)


def get_obj_from_str(target: str, allow: Iterable[str] = ()) -> Any:
    """The class or function that a dotted name points to.

    A config is often downloaded, so a name may only lead to what an allowed package defines itself: not to another
    package, nor to something that a module of ours imported.

    Args:
        target: 'package.module.Name'.
        allow: packages accepted besides ldm, torch.nn and torch.optim.

    Raises:
        ConfigError: the name is not allowed, or does not exist.
    """
    packages = (*ALLOWED_PACKAGES, *allow)
    choices = ", ".join(packages)
    if not isinstance(target, str):
        raise ConfigError(f"target: expected a dotted name such as 'torch.nn.Identity'; got {target!r}")
    module_name, _, name = _renamed(target).rpartition(".")
    if not inside(module_name, packages):
        raise ConfigError(
            f"target: {target!r} is outside the allowed packages ({choices}); if you trust it, "
            f"add its package with instantiate_from_config(config, allow=(...,))"
        )
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        # A missing dependency of an existing module must not read like a misspelt target.
        missing = f"no module {module_name!r}" if inside(module_name, [error.name or ""]) else str(error)
        raise ConfigError(f"target: cannot import {target!r}: {missing}") from error
    found = vars(module).get(name)
    if found is None:
        raise ConfigError(f"target: module {module_name!r} has no {name!r}")
    home = found.__module__ if inspect.isclass(found) or inspect.isfunction(found) else None
    if home is None or not inside(home, packages):
        raise ConfigError(f"target: {target!r} is not a class or function defined in one of: {choices}")
    return found


def instantiate_from_config(config: Mapping[str, Any], allow: Iterable[str] = (), **given: Any) -> Any:
    """Build the object that `config` describes: `target(**params, **given)`.

    Args:
        config: a mapping with `target` (dotted name of a class) and optionally `params` (its arguments).
        allow: packages accepted besides ldm, torch.nn and torch.optim.
        given: arguments that the config can't set.

    Raises:
        ConfigError: no target, a target that is not allowed, or arguments that its constructor does not accept, such
            as a negative width.
    """
    cls, params = _class_and_params(config, allow, given)
    try:
        return cls(**params)
    except (RuntimeError, ArithmeticError) as error:  # PyTorch's word on sizes that no tensor has
        raise ConfigError(
            f"params of target {config['target']!r}: nothing can be built with these values: {error}"
        ) from error


def check_config(config: Mapping[str, Any]) -> None:
    """Check the config and its parts (`..._config`) as far as possible without building them.

    Raises:
        ConfigError: see `instantiate_from_config`.
    """
    _, params = _class_and_params(config, (), {})
    for key, value in params.items():
        if key.endswith("_config") and isinstance(value, Mapping) and "target" in value:
            check_config(value)


def _class_and_params(
    config: Mapping[str, Any], allow: Iterable[str], given: Mapping[str, Any]
) -> tuple[type, dict[str, Any]]:
    if not isinstance(config, Mapping):
        raise ConfigError(f"config: expected a mapping with 'target' and 'params'; got {config!r}")
    if config.get("target") is None:
        keys = ", ".join(map(str, config)) or "none"
        raise ConfigError(f"config: 'target' is missing; its keys are: {keys}")
    target, params = config["target"], config.get("params")
    cls = get_obj_from_str(target, allow)
    if not inspect.isclass(cls):
        raise ConfigError(f"target: {target!r} is a function; a config can only build a class")
    if not isinstance(params, Mapping | None):
        raise ConfigError(f"params of target {target!r}: expected a mapping; got {params!r}")
    params = {str(key): value for key, value in (params or {}).items()}
    if taken := params.keys() & given.keys():
        raise ConfigError(f"params of target {target!r}: {', '.join(sorted(taken))} can't be set here")
    signature = _signature(cls)
    try:
        # Bound before the call, so that a TypeError from inside the constructor stays what it is.
        signature.bind(**params, **given)
        _check_types(cls, params)
    except TypeError as error:
        raise ConfigError(
            f"params of target {target!r}: {error}; accepted: {', '.join(signature.parameters)}"
        ) from error
    except ValidationError as error:
        raise ConfigError(f"params of target {target!r}: {first_error(error)}") from None
    return cls, params | given


def _check_types(cls: type, params: Mapping[str, Any]) -> None:
    """Raises ValidationError for an argument whose type is not that of the constructor's annotation."""
    schema = _schema(cls)
    # As JSON, whose lists may stand for tuples too; everything else must be of the type as it stands.
    stated = {name: value for name, value in params.items() if name in schema.model_fields}
    schema.model_validate_json(json.dumps(stated, default=_plain))


def _plain(value: Any) -> Any:
    """The value as JSON has it: OmegaConf's containers are no dicts and lists."""
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, Sequence) else repr(value)


@cache
def _schema(cls: type) -> type[BaseModel]:
    """The arguments of a constructor whose annotated types can be checked: those with a form in JSON."""
    fields: dict[str, Any] = {}
    for name, hint in _hints(cls).items():
        with suppress(PydanticSchemaGenerationError):
            TypeAdapter(hint)
            fields[name] = (hint, None)
    return create_model(cls.__name__, __config__=ConfigDict(strict=True, allow_inf_nan=False), **fields)


def _signature(cls: type) -> inspect.Signature:
    """The signature of a class. If its constructor passes `**rest` to its base, it includes that of the base."""
    signature = inspect.signature(cls)
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    if kinds[-1:] != [inspect.Parameter.VAR_KEYWORD] or inspect.Parameter.VAR_POSITIONAL in kinds:
        return signature
    own = [p.replace(kind=p.KEYWORD_ONLY) for p in list(signature.parameters.values())[:-1]]
    names = {p.name for p in own}
    rest = [p.replace(kind=p.KEYWORD_ONLY) for p in _signature(cls.__mro__[1]).parameters.values()]
    return inspect.Signature([*own, *(p for p in rest if p.name not in names)])


def _hints(cls: type) -> dict[str, Any]:
    """The annotated types of a constructor's arguments, and of its bases'."""
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        with suppress(NameError, TypeError, AttributeError):
            hints |= get_type_hints(vars(base).get("__init__", base.__init__), include_extras=True)
    return hints
