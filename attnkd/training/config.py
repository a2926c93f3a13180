"""What a run is: all its settings, typed, from defaults, a named row, YAML files and the command line, in this order.

jsonargparse makes the parser from the signatures below and from those of the methods' classes, so a method's new argument is
an option of the command at once, with its type and the text of its docstring.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import attnkd
from attnkd.methods.recipes import Recipe
from attnkd.methods.schedule import Schedule
from attnkd.training.carrying import Carrying
from attnkd.training.rows import ROWS, Row

METHODS = {
    "attn_distill": "AttnDistill",
    "head_kd": "HeadKD",
    "ssta": "SSTA",
    "attention_probe": "AttentionProbe",
    "minilm": "MiniLM",
}
"""Names on the command line and the classes of :mod:`attnkd`."""
TEACHERS = ("teacher", "assistant", "label_teacher")
"""Arguments of the methods that are frozen models. The first is of every method."""
GIVEN = ("student", *TEACHERS, "criterion", "num_classes", "input_norm", "device", "dtype", "verbose")
"""Arguments of the methods that the run itself makes."""
POS_EMBED = ("timm", "sincos", "fixed_sincos")
FREE = (
    "output",
    "resume",
    "device",
    "tensorboard",
    "wandb",
    "figures",
    "data_root",
    "download",
    "run",
    "teacher_cache",
)
"""Settings that may change when a run continues: what it ends with does not depend on them, but for rounding."""


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run besides the method's own.

    Args:
        output: the run's folder.
        student: timm name of the model to train, or another library's, such as hf:dinov2, hf:FOLDER or torchvision:vit_b_16 (docs/models.md).
        teacher: timm name; another library's, such as hf:FOLDER or hub:facebookresearch/dinov2:dinov2_vits14; or a saved model:
            model.safetensors with model.json beside it, as a run's folder has them.
        assistant: SSTA's second teacher, likewise.
        label_teacher: third model of HeadKD and SSTA that gives hard labels, likewise; of timm any classifier, a CNN too.
        data: 'digits', a folder with 'train' and 'validation' (or 'val') of images by class, or a data set of timm's, such as
            'torch/cifar100' or 'hfds/imagenet-1k'.
        recipe: the row that defaults come from.
        student_kwargs: arguments of ``timm.create_model`` for the student, such as '{img_size: 32, depth: 6}', or of the other
            library's configuration, such as '{hidden_size: 384}'.
        teacher_kwargs: for the teacher.
        assistant_kwargs: for the assistant.
        label_teacher_kwargs: for the label teacher.
        student_checkpoint: weights to start from, for the student; without them it starts at random.
        teacher_checkpoint: weights for the teacher, in place of timm's.
        assistant_checkpoint: for the assistant.
        label_teacher_checkpoint: for the label teacher.
        pos_embed: the student's position embeddings at the start: 'timm' (small random values), 'sincos', or 'fixed_sincos'
            that do not train.
        img_size: image size of all models but the label teacher, which has label_teacher_kwargs; None is that of the models.
        num_classes: of the student; None is the data set's.
        train_split: split to train on.
        val_split: split to evaluate on.
        subset: of the training images: a share of every class, such as 0.01, or a file with their names.
        data_root: folder that torch/ and hfds/ data sets are kept in.
        download: fetch a torch/ data set.
        mean: of each image channel; None is the data set's, else the teacher's.
        std: likewise.
        seed: of everything random.
        train: epochs, optimizer, learning rate, images.
        run: how it is carried out.
        resume: 'auto' continues what is in the folder; 'never' refuses a folder with a run.
        device: a PyTorch device; None is a GPU if there is one.
        tensorboard: write TensorBoard files beside the log.
        wandb: send the log to this project of Weights & Biases too.
        figures: epochs between drawings of curves.png and attention.png (matplotlib); None for none.
        teacher_cache: folder that `attnkd cache` made with the settings of this run; is read in place of running the teacher.
    """

    output: str
    student: str
    teacher: str | None = None
    assistant: str | None = None
    label_teacher: str | None = None
    data: str = "digits"
    recipe: str | None = None
    student_kwargs: dict[str, Any] = field(default_factory=dict)
    teacher_kwargs: dict[str, Any] = field(default_factory=dict)
    assistant_kwargs: dict[str, Any] = field(default_factory=dict)
    label_teacher_kwargs: dict[str, Any] = field(default_factory=dict)
    student_checkpoint: str | None = None
    teacher_checkpoint: str | None = None
    assistant_checkpoint: str | None = None
    label_teacher_checkpoint: str | None = None
    pos_embed: str = "timm"
    img_size: int | None = None
    num_classes: int | None = None
    train_split: str = "train"
    val_split: str = "validation"
    subset: str | None = None
    data_root: str | None = None
    download: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    seed: int = 0
    train: Recipe = field(default_factory=lambda: Recipe(epochs=100, batch_size=256))
    run: Carrying = field(default_factory=Carrying)
    resume: str = "auto"
    device: str | None = None
    tensorboard: bool = False
    wandb: str | None = None
    figures: int | None = None
    teacher_cache: str | None = None

    def __post_init__(self) -> None:
        if self.pos_embed not in POS_EMBED:
            raise ValueError(f"pos_embed: expected one of {', '.join(POS_EMBED)}, got {self.pos_embed!r}")
        if self.resume not in ("auto", "never"):
            raise ValueError(f"resume: expected 'auto' or 'never', got {self.resume!r}")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean, std: expected both or none")
        if self.figures is not None and self.run.shard:
            raise ValueError(
                "figures: not with run.shard; the first process draws the student's attention, but has only a share of its weights"
            )
        if self.figures is not None and self.figures < 1:
            raise ValueError(f"figures: expected at least 1 epoch, got {self.figures}")


@dataclass(frozen=True)
class Experiment:
    """A method, its arguments, and everything else."""

    method: str
    options: dict[str, Any]
    config: TrainConfig

    def settings(self) -> dict[str, Any]:
        """All settings as JSON knows them; :func:`read` makes the experiment of them again."""
        return {"method": self.method, "options": _plain(self.options), **_plain(self.config)}


def method_class(name: str) -> Any:
    return getattr(attnkd, METHODS[name])


def parse(method: str | None, words: Sequence[str]) -> Experiment:
    """The experiment that the words of a command line describe.

    Args:
        method: a name of :data:`METHODS`, or None to find it in the --config files.
        words: the options.

    Raises:
        ValueError: an unknown method, row or option, or a value of the wrong type.
        SystemExit: after --help and --print_config.
    """
    import jsonargparse

    method, row_name = _chosen(method, words)
    row = _row(method, row_name)
    parser = _parser(method)
    if row is not None:
        parser.set_defaults(dict(_dotted(row.defaults)))
        parser.set_defaults({"recipe": row_name})
    try:
        found = parser.parse_args(list(words))
    except jsonargparse.ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from None
    return build(found.as_dict(), method)


def experiment(method: str, options: Mapping[str, Any] | None = None, **settings: Any) -> Experiment:
    """An experiment from Python.

    Args:
        method: a name of :data:`METHODS`.
        options: the method's own arguments; the others have its defaults.
        settings: fields of :class:`TrainConfig`.

    Raises:
        ValueError: an unknown method, or an argument that it does not have or that the run itself makes.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    known = [name for name in inspect.signature(method_class(method)).parameters if name not in GIVEN]
    unknown = sorted(set(options or {}) - set(known))
    if unknown:
        raise ValueError(f"options: expected arguments of {method} ({', '.join(known)}), got {', '.join(unknown)}")
    return Experiment(method, {**_defaults(method), **(options or {})}, TrainConfig(**settings))


def build(values: Mapping[str, Any], method: str) -> Experiment:
    """The experiment of parsed values, as :meth:`Experiment.settings` writes them (method's options also under 'method')."""
    values = dict(values)
    options = values.pop("options", None) or values.pop("method", None) or {}
    for name in ("config", "task"):
        values.pop(name, None)
    if not isinstance(options, Mapping):
        options = {}
    for name, make in (("train", Recipe), ("run", Carrying)):
        try:
            values[name] = make(**_tuples(values[name]))
        except ValueError as error:  # it names the setting, as whoever calls from Python knows it
            raise ValueError(f"{name}.{error}") from None
    resolved = {**_defaults(method), **{name: _scheduled(value) for name, value in options.items()}}
    return Experiment(method, resolved, TrainConfig(**_tuples(values)))


def read(settings: Mapping[str, Any]) -> Experiment:
    """The experiment of saved settings."""
    return build({name: value for name, value in settings.items() if name != "method"}, settings["method"])


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two experiments' settings, without what may change when a run continues. A setting that came after a run began
    has its default there."""
    if old["method"] in METHODS:  # `attnkd eval finetune` has settings of its own
        with contextlib.suppress(TypeError):  # one that is gone: it is named below
            old = read(old).settings()
    before, now = ({k: v for k, v in x.items() if k not in FREE} for x in (old, new))
    changed = list(_differences(before, now, ""))
    for name in ("precision",):  # of how a run is carried out this alone is more than rounding
        if old["run"][name] != new["run"][name]:
            changed.append(f"run.{name} was {old['run'][name]}, now {new['run'][name]}")
    return changed


def as_yaml(settings: Mapping[str, Any]) -> str:
    """Settings as a --config file takes them."""
    import yaml

    written = {"task": settings["method"], **settings, "method": settings["options"]}
    del written["options"]
    return yaml.safe_dump(written, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)


def saved_settings(argument: str, path: Path) -> dict[str, Any]:
    """A run's settings, as its config.yaml has them.

    Raises:
        ValueError: names ``argument`` and the file.
    """
    import yaml

    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{argument}: {path} cannot be read ({str(error).splitlines()[0]})") from None


def _chosen(method: str | None, words: Sequence[str]) -> tuple[str, str | None]:
    """Method and row, from the words or from the configuration files among them."""
    import argparse

    import yaml

    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scan.add_argument("--recipe")
    scan.add_argument("--config", action="append", default=[])
    given, _ = scan.parse_known_args(list(words))
    row = given.recipe
    for path in given.config:
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"config: cannot read {path} ({error})") from None
        if not isinstance(content, dict):
            raise ValueError(f"config: expected settings by name in {path}")
        found = content.get("task")
        if method is None:
            method = found
        elif found not in (None, method):
            raise ValueError(f"config: {path} is of {found}, not of {method}")
        row = row or content.get("recipe")
    if method is None and row in ROWS:
        method = ROWS[row].method
    if method not in METHODS:
        raise ValueError(f"METHOD: expected one of {', '.join(METHODS)}, got {method!r}")
    return method, row


def _row(method: str, name: str | None) -> Row | None:
    if name is None:
        return None
    rows = [row for row, content in ROWS.items() if content.method == method]
    if name not in rows:
        raise ValueError(f"recipe: expected one of {', '.join(rows)} for {method}, got {name!r}")
    return ROWS[name]


def _defaults(method: str) -> dict[str, Any]:
    """The method's arguments that need not be given. Saved with a run, so that a default that changes later does not change it."""
    signature = inspect.signature(method_class(method)).parameters.values()
    return {p.name: p.default for p in signature if p.name not in GIVEN and p.default is not p.empty}


def _parser(method: str) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=f"attnkd train {method}",
        description=f"Train a student with attnkd.{METHODS[method]}. Options of the method begin with --method.",
        exit_on_error=False,
    )
    parser.add_argument(
        "--config", action="config", help="a YAML file of these settings, as config.yaml of a run's folder"
    )
    parser.add_argument("--task", default=method, help="the method's name, in configuration files")
    parser.add_class_arguments(TrainConfig)
    made = method_class(method)
    skip = set(GIVEN) & set(inspect.signature(made).parameters)
    parser.add_class_arguments(made, "method", skip=skip, instantiate=False)
    return parser


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested defaults by dotted names; arguments of models are values of their own."""
    for name, value in values.items():
        if name in ("train", "method"):
            yield from _dotted(value, f"{name}.")
        else:
            yield prefix + name, value


def _scheduled(value: Any) -> Any:
    if isinstance(value, Mapping) and {field.name for field in fields(Schedule)} >= set(value) and "value" in value:
        return Schedule(**value)
    return list(value) if isinstance(value, tuple) else value  # YAML and JSON have no tuples


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    if is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _differences(old: Any, new: Any, path: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif json.dumps(old) != json.dumps(new):
        yield f"{path} was {old}, now {new}"
