"""Which tasks were asked for, refused or built before any model is loaded.

Definitions (prompts, filters, metrics, groups) are lm-eval's own; only where rows come from, and
where written programs are run, is ours. lm-eval is imported in the functions that use it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from dataclasses import dataclass
from importlib import util
from io import StringIO
from pathlib import Path
from typing import Any

from pennyweight.data.read import nearest
from pennyweight.errors import ConfigError, DataError
from pennyweight.evaluate.tasks.confined import Confinement, find_confinement
from pennyweight.evaluate.tasks.local import BENCHMARKS, LocalRows, read_local
from pennyweight.evaluate.tasks.programs import judged_apart

__all__ = ["Tasks", "Wanted", "load_tasks", "quietly"]

# lm-eval's index of its 14,000 names takes ten seconds; these few folders take none.
OWN_FOLDERS = {"mmlu": "mmlu/default", "gsm8k": "gsm8k", "humaneval": "humaneval"}
HUMANEVAL = "openai/openai_humaneval"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to measure: names lm-eval knows, where rows are, and how many of them.

    `data_dirs`: folders with local rows; without one they come from the Hub or its cache.
    `limit`: rows of each task (of each subject of MMLU); None takes all. `num_fewshot`: examples
    before a question; None is the task's own number.
    """

    names: tuple[str, ...]
    data_dirs: tuple[Path, ...] = ()
    limit: int | None = None
    num_fewshot: int | None = None
    allow_code_execution: bool = False


@dataclass(frozen=True, slots=True)
class Tasks:
    """lm-eval's tasks and groups, ready.

    `sources` says of each task where its rows are from, `notes` what makes figures unlike the
    published ones, `confinement` what limits the programs of tasks that run code.
    """

    wanted: Wanted
    loaded: Mapping[str, Any]
    sources: Mapping[str, str]
    notes: tuple[str, ...]
    confinement: Confinement | None


def load_tasks(wanted: Wanted) -> Tasks:
    """Read the definitions and the rows; ConfigError or DataError says what cannot be measured."""
    if util.find_spec("lm_eval") is None:
        raise ConfigError(
            "--tasks needs lm-eval, which is not installed: pip install 'pennyweight[eval]'"
        )
    if not wanted.names:
        raise ConfigError("--tasks: no task is named; such as mmlu,gsm8k,humaneval")
    with quietly():
        manager = _manager_of(wanted.names)
    index = manager.task_index
    _refuse_unknown(wanted.names, index)
    leaves = {leaf: index[leaf].cfg for name in wanted.names for leaf in _leaves(index, name)}
    confinement = find_confinement() if _runs_code(leaves, wanted) else None
    builder = _Builder(manager, wanted, confinement)
    with quietly():
        built = [item for name in wanted.names for item in builder.build(name)]
        loaded = manager.load(built)
    if not loaded["tasks"]:
        raise DataError(f"{', '.join(wanted.names)}: the local rows hold none of these")
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        task.set_config("num_fewshot", _examples(own, wanted.num_fewshot))
    return Tasks(wanted, loaded, builder.sources, tuple(dict.fromkeys(builder.notes)), confinement)


@contextmanager
def quietly() -> Iterator[None]:
    """lm-eval's bars and warnings go nowhere: progress is told by whoever calls, faults are raised."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _manager_of(names: Sequence[str]) -> Any:
    """lm-eval's manager over a few folders where they hold all names, else over all it has."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders = {root / folder for stem, folder in OWN_FOLDERS.items() for n in names if stem in n}
    if folders:
        few = lm_eval.tasks.TaskManager(include_path=sorted(folders), include_defaults=False)
        if set(names) <= set(few.all_tasks):
            return few
    return lm_eval.tasks.TaskManager()


def _refuse_unknown(names: Sequence[str], index: Mapping[str, Any]) -> None:
    faults = [
        f"--tasks: lm-eval knows no task {name!r}{nearest(name, list(index))}"
        for name in names
        if name not in index
    ]
    if faults:
        raise ConfigError.all(faults)


def _leaves(index: Mapping[str, Any], name: str) -> Iterator[str]:
    """The tasks that a name stands for; groups and tags stand for several."""
    if name not in index:
        raise ConfigError(f"{name}: a task written inside a group; name tasks of their own")
    children = _children(index[name])
    if children is None:
        yield name
    else:
        for child in children:
            yield from _leaves(index, child if isinstance(child, str) else str(child.get("task")))


def _children(entry: Any) -> list[Any] | None:
    """What a group or a tag holds; None for a task."""
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    if entry.kind.name != "GROUP":
        return None
    listed = entry.cfg.get("task") or []
    return listed if isinstance(listed, list) else [listed]


def _runs_code(leaves: Mapping[str, Mapping[str, Any]], wanted: Wanted) -> bool:
    """Whether answers are run as programs; refused where that was not allowed, or cannot be apart."""
    writing = {name: cfg for name, cfg in leaves.items() if cfg.get("unsafe_code")}
    faults = [
        f"{name}: lm-eval would run the model's programs inside this process, which Pennyweight never "
        "does; of tasks that run code only humaneval is known here"
        for name, cfg in writing.items()
        if cfg.get("dataset_path") != HUMANEVAL
    ]
    if writing and not faults and not wanted.allow_code_execution:
        faults = [
            f"{', '.join(writing)}: runs programs that the model writes; --allow-code-execution runs them in "
            "separate, limited processes (docs/benchmarks.md says what that does not protect from)"
        ]
    if faults:
        raise ConfigError.all(faults)
    return bool(writing)


def _examples(own: int | None, asked: int | None) -> int:
    """How many: as lm-eval's own command has it, a task that fixes its number at 0 keeps it."""
    return own or 0 if asked is None or own == 0 else asked


class _Builder:
    """Builds what a name stands for, with rows from the local folders where there are any."""

    def __init__(self, manager: Any, wanted: Wanted, confinement: Confinement | None) -> None:
        self._manager, self._wanted, self._confinement = manager, wanted, confinement
        self._rows: dict[str, LocalRows] = {}
        self.sources: dict[str, str] = {}
        self.notes: list[str] = []

    def build(self, name: str) -> list[Any]:
        """lm-eval's task, group or tasks of this name; nothing where the local rows hold none."""
        entry = self._manager.task_index[name]
        if not any(self._is_ours(leaf) for leaf in _leaves(self._manager.task_index, name)):
            return self._from_hub(name)
        children = _children(entry)
        if children is None:
            task = self._task(name, entry.cfg)
            return [] if task is None else [task]
        if any(not isinstance(child, str) for child in children):
            raise ConfigError(f"{name}: a group that changes its tasks; name the tasks themselves")
        items = [item for child in children for item in self.build(child)]
        return items if entry.kind.name == "TAG" else _group(entry.cfg, items)

    def _is_ours(self, leaf: str) -> bool:
        """Whether its rows, or its judge, are ours."""
        config = self._manager.task_index[leaf].cfg
        local = bool(self._wanted.data_dirs) and config.get("dataset_path") in BENCHMARKS
        return local or bool(config.get("unsafe_code"))

    def _task(self, name: str, config: Mapping[str, Any]) -> Any:
        changes = self._local(name, config) if self._wanted.data_dirs else {}
        if changes is None:
            return None
        if not config.get("unsafe_code"):
            # A group of one lets lm-eval resolve the definition, and put the changes over it.
            group = {"group": "one", "task": [{"task": name, **changes}]}
            return self._manager.load([group])["tasks"][name]
        from lm_eval.api.task import ConfigurableTask

        assert self._confinement is not None, "allowed, or refused before"
        # lm-eval's own file must not even be resolved: importing its judge runs a program.
        kept = {k: v for k, v in deepcopy(dict(config)).items() if k != "tag"}
        judged = {**kept, **judged_apart(config, self._confinement), **changes}
        self.sources.setdefault(name, f"{HUMANEVAL} from the Hub or its cache")
        with _told(name):
            return ConfigurableTask(config=judged)

    def _from_hub(self, name: str) -> list[Any]:
        self.sources[name] = "the Hub or its cache"
        with _told(name):
            loaded = self._manager.load([name])
        group = loaded["groups"].get(name)
        return [group] if group is not None else list(loaded["tasks"].values())

    def _local(self, name: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """What to change in a definition so that it reads local rows; None where there are none."""
        benchmark = BENCHMARKS[config["dataset_path"]]
        if benchmark.name not in self._rows:
            self._rows[benchmark.name] = read_local(benchmark, self._wanted.data_dirs)
        found = self._rows[benchmark.name].of_subject(config.get("dataset_name"))
        if not found.splits:
            self.notes.append(f"{benchmark.name}: no rows for {config.get('dataset_name')}")
            return None
        split = next(s for s in ("test", "validation", "dev", "train") if s in found.splits)
        asked = config.get("test_split") or config["validation_split"]
        if split != "test":
            self.notes.append(
                f"{benchmark.name}: measured on the {split} rows; the folder has no test rows"
            )
        files = ", ".join(found.files[:3]) + (" and more" if len(found.files) > 3 else "")
        self.sources[name] = f"{files} ({split} rows)"
        changes = {"custom_dataset": _dataset({**found.splits, asked: found.splits[split]})}
        examples = config.get("fewshot_split") or config.get("training_split")
        of_its_own = "samples" in (config.get("fewshot_config") or {})
        if not of_its_own and (examples == split or examples not in found.splits):
            # lm-eval leaves the question itself out where examples come from the split it asks.
            changes["fewshot_split"] = asked
            if _examples(config.get("num_fewshot"), self._wanted.num_fewshot):
                self.notes.append(f"{benchmark.name}: examples are other rows of those measured")
        return changes


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Rows that cannot be had: DataError with both ways out. `datasets` has no one error for it."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, DatasetsError) as fault:
        reason = (str(fault).strip() or type(fault).__name__).splitlines()[0][:200]
        raise DataError(
            f"{name}: its rows are neither here nor to be had from the Hub ({reason}); either give a folder "
            "that has them (--data-dir FOLDER, for mmlu, gsm8k and humaneval), or let the Hub be reached: "
            "unset HF_HUB_OFFLINE and check the network"
        ) from fault


def _group(config: Mapping[str, Any], items: Sequence[Any]) -> list[Any]:
    from lm_eval.api.group import Group
    from lm_eval.config.group import GroupConfig

    fields = GroupConfig.__dataclass_fields__
    group = Group.from_config({k: deepcopy(v) for k, v in config.items() if k in fields})
    for item in items:
        group.add(item)
    return [group] if items else []


def _dataset(splits: Mapping[str, list[dict[str, Any]]]) -> Callable[..., Any]:
    def dataset(**_: Any) -> _Splits:
        return _Splits(splits)

    return dataset


class _Splits(dict[str, Any]):
    """Splits as `datasets` has them, each made when it is first asked for."""

    def __init__(self, rows: Mapping[str, list[dict[str, Any]]]) -> None:
        super().__init__()
        self._rows = rows

    def __missing__(self, split: str) -> Any:
        from datasets import Dataset

        self[split] = Dataset.from_list(self._rows[split])
        return self[split]
