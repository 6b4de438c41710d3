"""Plans by name, by rule and from files.

The published key lists are in configs/plans/NAME.yaml:

    source: where the list was published
    note:   anything a user should know (optional)
    steps:  {50: [0-3, 5, 10]}   key nodes of a run of that many nodes, a-b inclusive; or
    every:  4                    every fourth node of any run; or
    window: {warm_up: 5, first: 2, growth: 0.75}     the first nodes, then gaps that grow at each key node; or
    same_as: NAME                another plan's keys under a second published name

and, optional, how a plan is to be run and for what it was made:

    level:     deepcache         what runs at the other nodes, one of LEVELS; encoder if not given
    apart:     {encoder: [1-5]}  nodes at levels of their own, only with a list for just this number of nodes
    branch:    1                 with deepcache: how many outermost blocks
    propagate: linear            see `Plan`; if not given, what is usual for the level
    made_for: {sampler: ddim, weights: 0123456789abcdef}     other runs are refused
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count, takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from ldm.checkpoint import fingerprint
from ldm.io.errors import did_you_mean, shown
from ldm.io.files import PROJECT_ROOT, Number, Schema, Text, parse, read_yaml
from ldm.models.diffusion.propagation.calibration import Calibration, Nodes, read_calibration
from ldm.models.diffusion.propagation.online import OnlinePlan
from ldm.models.diffusion.propagation.plan import (
    LEVELS,
    MEASURED,
    USUAL,
    USUAL_WITH_NOISE,
    ForecastName,
    Plan,
    plan_of_level,
    with_level,
)

PLAN_DIR = PROJECT_ROOT / "configs" / "plans"
FORMS = (
    "off",
    "uniform:N",
    "pro",
    "skip:KEYS",
    "deepcache:KEYS[:BRANCH]",
    "tgate:M",
    "tgate:KEYS",
    "encoder:KEYS[:BLOCKS]",
    "PLAN+LEVEL:STEPS",
    "online:[time:]X",
    "[LEVEL:]auto:K",
    "[LEVEL:]auto:SHARE%",
)
NUMBER = r"\d{1,9}"  # of nodes; Python itself refuses to read thousands of digits, and says nothing of plans
SUFFIXES = (".yaml", ".yml")
NOISY = ("ddpm", "ddpm-learned", "euler-a")  # solvers that always add noise at every step; others do with an eta


def plan_names() -> tuple[str, ...]:
    """Names that `load_plan` knows besides the general forms, sorted."""
    return tuple(sorted(path.stem for path in PLAN_DIR.glob("*.yaml")))


@dataclass(frozen=True)
class RunFacts:
    """What is known of the run that a plan is for.

    facts:        "sampler", "weights" (digest), "scale", ...; a plan that was made for others is refused. What is not
        known is not compared.
    calibrations: folder with the model's tables, for plans `auto:...`.
    weights_file: whose digest is the fact "weights", where facts have none; it is read only if a plan needs it.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    calibrations: Path | None = None
    weights_file: Path | None = None

    @staticmethod
    def of(sampler: str, weights_file: Path | None, **more: Any) -> RunFacts:
        """The facts of a run: this sampler, the model of this file (or diffusers folder) if it is known, and more.

        The model's calibrations lie beside its weights.
        """
        return RunFacts({"sampler": sampler, **more}, weights_file and calibrations_of(weights_file), weights_file)

    def usual_forecast(self, level: str) -> str:
        """The forecaster of a level of LEVELS, unless it is given."""
        sampler = f"{self.facts.get('sampler')}-"  # its spacing may follow, see `Spacings.name_of`
        noisy = self.facts.get("eta") or any(sampler.startswith(f"{name}-") for name in NOISY)
        return (USUAL_WITH_NOISE if noisy else USUAL)[level]

    def check(self, made_for: Mapping[str, Any], what: str) -> None:
        """Raise ValueError if what was made for another run. What was made for some weights was made for them alone,
        without additions such as a LoRA or a control network."""
        facts = dict(self.facts)
        made_for = {**({"additions": None} if "weights" in made_for else {}), **made_for}
        if "weights" in made_for.keys() - facts.keys() and self.weights_file is not None:
            facts["weights"] = fingerprint(self.weights_file)[:16]
        for name, wanted in made_for.items():
            if name in facts and facts[name] != wanted:
                raise ValueError(f"{what} was made for {name} {_said(wanted)}; this run's is {_said(facts[name])}")


def _said(fact: Any) -> str:
    """A fact in a message, of long lists the beginning."""
    if not isinstance(fact, list):
        return "none" if fact is None else str(fact)
    return f"{', '.join(f'{value:g}' for value in fact[:4])}{', ...' if len(fact) > 4 else ''}"


def calibrations_of(weights_file: Path) -> Path:
    """Where a model's calibrations lie: beside its weights."""
    return (weights_file if weights_file.is_dir() else weights_file.parent) / "calibration"


def load_plan(
    spec: str, num_nodes: int, parallel: int = 1, propagate: str | None = None, run: RunFacts | None = None
) -> Plan | OnlinePlan:
    """The plan that `spec` names, for a run of `num_nodes` nodes.

    Args:
        spec: key nodes, at the others the decoder: `off` (every node is a key node), a name of `plan_names()`,
            `uniform:N` (every N-th node), `pro` (gaps that grow by one: 0, 2, 5, 9, ...), `0,1,2,5` or `0-3,5`, or the
            path of a .yaml file in the format above; the same after a level, `skip:KEYS`, `deepcache:KEYS[:BRANCH]` or
            `encoder:KEYS[:BLOCKS]`, where N stands for `uniform:N` (at the other nodes nothing; only the outermost
            BRANCH blocks, by default 1, and with 0 nothing; the decoder, and anew so many input blocks), and
            `tgate:KEYS`, where M stands for the first M nodes (all but cross-attention); `online:X` or `online:time:X`
            (decided on the way, at a relative change of X of the latent or of the embedded timestep); `auto:K` or
            `auto:80%`, also after a level (the best K key nodes, or as many as 80 % of the plain run's MACs allow, by
            the model's calibration; 0.8 is the same). After any of these but `online`, `+LEVEL:NODES` sets nodes apart
            at another level, or `full`, as in `skip:6+encoder:1-5+full:49`; `+deepcache:NODES:BRANCH` with so many
            blocks.
        num_nodes: network evaluations of the run; for DDIM the length of its timestep grid.
        parallel: most decoder steps in one batch.
        propagate: see `Plan`; None = as the plan's file or calibration says, or what is usual for the level
            (`RunFacts.usual_forecast`).
        run: what is known of the run, to refuse what was made for another.

    Named and file plans hold exactly at the run lengths they list. At other lengths the longest list is
    scaled: key k of n becomes floor(k * num_nodes / n), repeats dropped. Rules (`every`, `window`, `uniform:N`, `pro`)
    are not scaled, nor is a file that says what run it was made for.

    Raises:
        ValueError: unknown name, malformed spec or file, keys that do not start at 0, do not increase or are
            past the end of the run; a plan made for another run; one that does not go with `propagate`.
    """
    if num_nodes < 1:
        raise ValueError(f"num_nodes must be at least 1; got {num_nodes}")
    plan = _plan(spec, num_nodes, propagate, run or RunFacts())
    return replace(plan, parallel=parallel, propagate=plan.propagate if propagate is None else propagate)


def _plan(spec: str, num_nodes: int, propagate: str | None, run: RunFacts) -> Plan | OnlinePlan:
    return (
        _online(spec, num_nodes)
        or _mixed(spec, num_nodes, propagate, run)
        or _auto(spec, num_nodes, propagate, run)
        or _leveled(spec, num_nodes, run)
        or _keyed(spec, num_nodes, run)
    )


WITH_FULL = "|".join(("full", *LEVELS))


def _mixed(spec: str, num_nodes: int, propagate: str | None, run: RunFacts) -> Plan | None:
    base, *apart = re.split(rf"\+(?=(?:{WITH_FULL}):)", spec)
    if not apart:
        return None
    plan = _plan(base, num_nodes, propagate, run)
    if not isinstance(plan, Plan):
        raise ValueError(f"an online plan decides during the run, so no steps can be set apart; got {spec!r}")
    for part in apart:
        match = re.fullmatch(rf"({WITH_FULL}):([\d,-]+)(?::({NUMBER}))?", part)
        if match is None or (match[3] and match[1] != "deepcache"):
            raise ValueError(
                f"steps are set apart as +LEVEL:STEPS, with {WITH_FULL.replace('|', ', ')} and steps such as 1-5,9, or "
                f"as +deepcache:STEPS:BRANCH; got +{part}"
            )
        plan = with_level(plan, match[1], _expand(match[2].split(","), num_nodes), int(match[3] or 1))
    return plan


def _online(spec: str, num_nodes: int) -> OnlinePlan | None:
    match = re.fullmatch(r"online:(?:(\w+):)?([^:]+)", spec)
    if match is None:
        return None
    try:
        threshold = float(match[2])
    except ValueError:
        raise ValueError(f"an online plan needs a threshold, as in online:0.1; got {spec!r}") from None
    return OnlinePlan(num_nodes, threshold, match[1] or "latent")


def _leveled(spec: str, num_nodes: int, run: RunFacts) -> Plan | None:
    level, _, of = spec.partition(":")
    if level in LEVELS and of.partition(":")[0] == "online":
        raise ValueError(f"online takes no level before it; got {spec!r}")
    match = re.fullmatch(rf"({'|'.join(LEVELS)}):(uniform:{NUMBER}|[^:]+)(?::({NUMBER}))?", spec)
    if match is None:
        return None
    level, of, blocks = match.groups()
    if blocks and level not in ("deepcache", "encoder"):
        raise ValueError(f"only deepcache and encoder take a number of blocks, as in deepcache:3:1; got {spec!r}")
    if not re.fullmatch(NUMBER, of):
        keys = _keyed(of, num_nodes, run).keys
    else:
        keys = _first(int(of), num_nodes) if level == "tgate" else _every(int(of), num_nodes)
    plan = plan_of_level(num_nodes, keys, level, int(blocks or 1), propagate=run.usual_forecast(level))
    return replace(plan, refresh=int(blocks or 0)) if level == "encoder" else plan


def _auto(spec: str, num_nodes: int, propagate: str | None, run: RunFacts) -> Plan | None:
    match = re.fullmatch(rf"(?:({'|'.join(MEASURED)}):)?auto:(.*)", spec)
    if match is None:
        return None
    level, size = match[1] or "encoder", match[2]
    number = re.fullmatch(rf"({NUMBER})|(0?\.\d+)|({NUMBER}(?:\.\d+)?)%", size)
    if number is None:  # 1.0 among them: one key node, or all of the MACs?
        raise ValueError(
            f"auto takes a number of key timesteps, as in auto:9, or a share of the plain run's MACs, as in "
            f"auto:80%; got {spec!r}"
        )
    keys, fraction, percent = number.groups()
    calibration = _calibration(num_nodes, run)
    if keys:
        return calibration.plan(int(keys), level, propagate)
    return calibration.plan_within(float(fraction or float(percent) / 100), level, propagate)


def _calibration(num_nodes: int, run: RunFacts) -> Calibration:
    """The model's own for this sampler and run length."""
    folder, sampler = run.calibrations, run.facts.get("sampler")
    if folder is None:
        raise ValueError(
            "auto plans need a calibration, which is stored beside the model's weights, and the file of these "
            "weights is not known; load the model with ldm.load or ldm.checkpoint.load_model"
        )
    there = sorted(folder.glob("*.json")) if folder.is_dir() else []
    own = re.compile(rf"{re.escape(str(sampler))}-\d+(-.+)?")  # not euler-a-50 for euler
    found = {path: read_calibration(path) for path in there if own.fullmatch(path.stem)}
    why = None
    for path, calibration in found.items():
        if calibration.num_nodes == num_nodes:
            try:
                run.check(calibration.made_for, f"calibration {path.name}")
            except ValueError as error:
                why = why or error
            else:
                return calibration
    if why is not None:
        alone = "plans are calibrated for the model alone"
        advice = alone if run.facts.get("additions") else "scripts/calibrate_plan.py makes one for such runs"
        raise ValueError(f"{why}; {advice}")
    lengths = ", ".join(str(calibration.num_nodes) for calibration in found.values())
    raise ValueError(
        f"auto plans need a calibration of this model for {sampler} with {num_nodes} nodes; there is "
        f"{f'one for {lengths}' if lengths else 'none'}; scripts/calibrate_plan.py makes it"
    )


def level_of(spec: str) -> str:
    """One of LEVELS: what runs at the nodes of a plan that are no key nodes; encoder where `spec` does not say.

    Raises:
        ValueError: `spec` is a file that can't be read or is no plan.
    """
    level, path = spec.partition(":")[0], _path(spec)
    return level if level in LEVELS else _read(path).level if path.suffix in SUFFIXES else "encoder"


def _path(spec: str) -> Path:
    """The path of the plan file with this name, if there is one; otherwise the spec is the path."""
    return PLAN_DIR / f"{spec}.yaml" if spec in plan_names() else Path(spec)


def _keyed(spec: str, num_nodes: int, run: RunFacts) -> Plan:
    path = _path(spec)
    if path.suffix in SUFFIXES:
        file = _read(path)
        file.check(path, num_nodes, run)
        with _of_file(path):
            return file.plan(num_nodes, run)
    return Plan(num_nodes, _keys(spec, num_nodes))


def _keys(spec: str, num_nodes: int) -> tuple[int, ...]:
    if spec == "off":
        return tuple(range(num_nodes))
    if spec == "pro":
        return tuple(takewhile(lambda i: i < num_nodes, (m * (m + 3) // 2 for m in count())))
    if uniform := re.fullmatch(rf"uniform:({NUMBER})", spec):
        return _every(int(uniform[1]), num_nodes)
    if spec[:1].isdigit():
        return _expand(spec.split(","), num_nodes)
    raise ValueError(
        f"unknown plan {spec!r}; accepted: {', '.join(FORMS)}, key timesteps such as 0,1,2,5, a .yaml file, or one of "
        f"{', '.join(plan_names())}{did_you_mean(spec, (*FORMS, *plan_names()))}"
    )


def _every(n: int, num_nodes: int) -> tuple[int, ...]:
    if n < 1:
        raise ValueError(f"a uniform plan needs N >= 1, a key timestep at every N-th step; got {n}")
    return tuple(range(0, num_nodes, n))


def _first(m: int, num_nodes: int) -> tuple[int, ...]:
    if m < 1:
        raise ValueError(f"tgate:M needs M >= 1, the number of first steps that run in full; got {m}")
    return tuple(range(min(m, num_nodes)))


def _expand(entries: Iterable[int | str], num_nodes: int) -> tuple[int, ...]:
    """Key nodes of a run from entries such as 7 or '0-3' (inclusive)."""
    keys: list[int] = []
    for entry in entries:
        span = re.fullmatch(rf"\s*({NUMBER})(?:-({NUMBER}))?\s*", str(entry))
        if span is None:
            raise ValueError(
                f"key timesteps must be numbers of at most 9 digits, or ranges such as 0-3; got {shown(entry)}"
            )
        nodes = range(int(span[1]), int(span[2] or span[1]) + 1)
        # Before they are counted out, which could fill the memory.
        if nodes and nodes[-1] >= num_nodes:
            raise ValueError(
                f"key {nodes[-1]} is past the last node {num_nodes - 1}; this schedule is for a longer run"
            )
        if not nodes or (keys and nodes[0] <= keys[-1]):
            raise ValueError(f"keys must increase strictly; got {entry}{f' after {keys[-1]}' if keys else ''}")
        keys += nodes
    return tuple(keys)


def _no_file(spec: str) -> str:
    """A file could name itself."""
    if Path(spec).suffix in SUFFIXES:
        raise ValueError(f"should be the name of a plan, or a rule such as uniform:4; got {shown(spec)}")
    return spec


class _Window(Schema):
    """Key nodes 0..warm_up-1, then one every `first` nodes, rounded down, which grows by `growth` at each."""

    warm_up: Nodes
    first: Annotated[Number, Field(ge=1)]
    growth: Annotated[Number, Field(ge=0)]

    def keys(self, num_nodes: int) -> tuple[int, ...]:
        keys, size = [*range(min(self.warm_up, num_nodes))], self.first
        while (i := keys[-1] + int(size)) < num_nodes:
            keys, size = [*keys, i], size + self.growth
        return tuple(keys)


class _PlanFile(Schema):
    """The contents of one plan file; exactly one of steps, every, window and same_as is given."""

    source: Text
    note: str = ""
    steps: dict[Nodes, list[Any]] = {}
    every: Nodes | None = None
    window: _Window | None = None
    same_as: Annotated[Text, AfterValidator(_no_file)] | None = None
    level: Literal[tuple(LEVELS)] = "encoder"
    branch: Annotated[int, Field(ge=1)] = 1
    propagate: ForecastName | None = None
    apart: dict[Literal[tuple(LEVELS)], list[Any]] = {}
    made_for: dict[str, Any] = {}

    @model_validator(mode="after")
    def _has_one_rule(self) -> _PlanFile:
        if sum(map(bool, (self.steps, self.every, self.window, self.same_as))) != 1:
            raise ValueError("give exactly one of steps, every, window, same_as")
        if self.apart and len(self.steps) != 1:
            raise ValueError("apart needs steps, with a list for one number of steps")
        return self

    def plan(self, num_nodes: int, run: RunFacts) -> Plan:
        """Raises ValueError: keys that are faulty, or nodes set apart in a run of another length."""
        propagate = self.propagate or run.usual_forecast(self.level)
        plan = plan_of_level(num_nodes, self.keys(num_nodes), self.level, self.branch, propagate=propagate)
        if self.apart and num_nodes not in self.steps:
            raise ValueError(f"steps set apart are not scaled: it is for {min(self.steps)} steps, not {num_nodes}")
        for level, nodes in self.apart.items():
            plan = with_level(plan, level, _expand(nodes, num_nodes), self.branch)
        return plan

    def check(self, path: Path, num_nodes: int, run: RunFacts) -> None:
        """Raise ValueError if the plan was made for another run."""
        run.check(self.made_for, f"plan file {path}")
        if self.made_for and self.steps and num_nodes not in self.steps:
            raise ValueError(
                f"plan file {path} was made for {', '.join(map(str, self.steps))} nodes; this run has {num_nodes}"
            )

    def keys(self, num_nodes: int) -> tuple[int, ...]:
        if self.same_as is not None:
            return _keyed(self.same_as, num_nodes, RunFacts()).keys
        if self.every is not None:
            return _every(self.every, num_nodes)
        if self.window is not None:
            return self.window.keys(num_nodes)
        if num_nodes in self.steps:
            return _expand(self.steps[num_nodes], num_nodes)
        longest = max(self.steps)
        keys = _expand(self.steps[longest], longest)
        Plan(longest, keys)  # a faulty list is reported as written, before scaling can hide its fault
        return tuple(sorted({k * num_nodes // longest for k in keys}))


def _read(path: Path) -> _PlanFile:
    with _of_file(path):
        try:
            content = read_yaml(path)
        except OSError as error:
            raise ValueError(f"it cannot be read: {error.strerror}") from None
        return parse(_PlanFile, content)


@contextmanager
def _of_file(path: Path) -> Iterator[None]:
    """Errors inside name the file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"plan file {path} is not a plan: {error}") from None
