"""From a path that a recipe names to the object in user code, with one sentence for each fault.

A path is `path/file.py:object`, or the file alone where only one object in it can be meant,
relative to the recipe's folder (the working directory comes second), or `package.module:object`.
User code runs only when a recipe or a command names it. A file is executed under a module name of
its own (made from its path and contents, so that editing it gives a new module and pickling works
within the process); its folder never enters `sys.path`, so it cannot import its neighbours.

In a job that was submitted to a cluster, a file is executed as it was at submission:
RLPROMPT_FROZEN names the folder with the copies (`rlprompt.slurm.frozen`).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from rlprompt.errors import InputError, choices, describe_error, user_frame
from rlprompt.process_exit import forks_end
from rlprompt.reading import json_text
from rlprompt.reading.files import expanded, read_bytes
from rlprompt.settings import UserClass

FROZEN_FILES = "files.json"
"""In the folder of a submission: the name of each file's copy, by the file's absolute path."""
FROZEN_CODE = "code"
"""Folder of the copies in it."""

Choice = Callable[[ModuleType, str], Any]
"""From a module and the path of its file to the object in it that is meant."""


def is_path(name: str) -> bool:
    """Whether a name in a recipe is a path to user code, and not the name of something built in."""
    return ":" in name or name.endswith(".py")


def absolute(path: str, base_dir: Path) -> str:
    """A path as it can be named from anywhere.

    Args:
        path: path of an object that is there.
        base_dir: folder that a file path is relative to.
    """
    location, _, name = path.rpartition(":")
    if path.endswith(".py"):
        return str(_find_file(path, base_dir))
    return f"{_find_file(location, base_dir)}:{name}" if location.endswith(".py") else path


def load_object(path: str, base_dir: Path, choose: Choice | None = None) -> Any:
    """The function, class or other object that a path names.

    Args:
        path: location and name of the object; the colon may be a dot where there is no file.
        base_dir: folder that file paths are relative to; the working directory comes second.
        choose: function from the module of a file that is named alone, and the file's path, to the
            object that is meant; None = a name must be given.

    Raises:
        InputError: the file, module or object is missing, importing it raised, or it is no path.
    """
    location, _, name = path.rpartition(":")
    if location.endswith(".py"):
        file = _find_file(location, base_dir)
        return _attribute(_import_file(file), name, str(file))
    if path.endswith(".py"):
        if choose is not None:
            file = _find_file(path, base_dir)
            return choose(_import_file(file), str(file))
        raise InputError(f"{path} names no object; write {path}:NAME with the object's name")
    if not location:
        location, _, name = path.rpartition(".")
    parts = f"{location}.{name}".split(".")
    if not location or not all(part.isidentifier() for part in parts):
        raise InputError(
            f"{path!r} is not the path of an object; write path/file.py:object or "
            "package.module:object"
        )
    return _attribute(_import_module(location), name, f"module {location}")


def load_class(path: str, base_dir: Path, base: UserClass) -> UserClass:
    """The class that a path names, which can stand where `base` is wanted.

    Args:
        path: a path as `load_object` takes it.
        base_dir: folder that file paths are relative to.
        base: the class that it must derive from; its `Settings` is what the class's own must
            derive from.

    Raises:
        InputError: see `load_object`; it is no such class, leaves something abstract, or has no
            settings of its own.
    """
    found: Any = load_object(path, base_dir, partial(_only_class, base=base))
    if not isinstance(found, type):
        kind = type(found).__name__
        raise InputError(f"{path} is a {kind}; name a class that derives from {_public(base)}")
    if not issubclass(found, base):
        raise InputError(f"{path} does not derive from {_public(base)}; name a class that does")
    made: UserClass = found
    missing = sorted(getattr(made, "__abstractmethods__", ()))
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}; define what {base.__name__} asks for")
    own = made.Settings
    if own is base.Settings or not (isinstance(own, type) and issubclass(own, base.Settings)):
        raise InputError(
            f"{path} has no settings of its own; derive a class from {_public(base.Settings)} "
            f"and write `Settings = ` with its name in {made.__name__}"
        )
    return made


def own_objects(module: ModuleType) -> dict[str, Any]:
    """The public functions, classes and instances that a module defines itself, by name."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and module.__name__
        in (getattr(value, "__module__", None), getattr(type(value), "__module__", None))
    }


def _only_class(module: ModuleType, file: str, base: UserClass) -> Any:
    """The one class in a file that can stand where `base` is wanted."""
    found = {
        name: value
        for name, value in own_objects(module).items()
        if isinstance(value, type) and issubclass(value, base)
    }
    if len(found) == 1:
        return next(iter(found.values()))
    there = f"several ({', '.join(found)})" if found else "none"
    raise InputError(
        f"{file} is to hold one class that derives from {_public(base)} and holds {there}; write "
        f"{Path(file).name}:NAME with the one to use"
    )


def _public(base: UserClass) -> str:
    """Where a class of the user's own finds what it derives from."""
    return f"rlprompt.extend.{base.__name__}"


def _find_file(location: str, base_dir: Path) -> Path:
    given = expanded(location, "the path of user code")
    places = [base_dir / given, Path.cwd() / given]  # an absolute path replaces the folder
    for place in places:
        if place.is_file() or _frozen_copy(place.resolve()) is not None:
            return place.resolve()
    tried = " nor ".join(dict.fromkeys(str(place) for place in places))
    raise InputError(f"there is no file {tried}; correct the path, relative to the recipe's folder")


def frozen_folder() -> Path | None:
    """The folder of the submission that this process runs for; None outside of a job."""
    named = os.environ.get("RLPROMPT_FROZEN")
    return Path(named) if named else None


def as_submitted(file: Path) -> Path:
    """Where to read a file: in a job, its copy from when the job was submitted, if it has one."""
    return (_frozen_copy(file.resolve()) if frozen_folder() else None) or file


def _frozen_copy(file: Path) -> Path | None:
    """The copy that is executed in place of a file; None where the file itself is."""
    folder = frozen_folder()
    if folder is None:
        return None
    name = _frozen_names(folder).get(str(file))
    return None if name is None else folder / FROZEN_CODE / name


@lru_cache(maxsize=4)
def _frozen_names(folder: Path) -> dict[str, str]:
    try:
        return dict(json_text.loads(read_bytes(folder / FROZEN_FILES)))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"RLPROMPT_FROZEN is '{folder}', which holds no readable {FROZEN_FILES} ({error}); "
            "submit the job again, or unset the variable"
        ) from error


class _CopyLoader(SourceFileLoader):
    """Executes a copy under the path of the original, past the original's compiled cache."""

    def __init__(self, name: str, path: str, source: bytes) -> None:
        super().__init__(name, path)
        self._source = source

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = self.source_to_code(self._source, self.path)
        return code

    def get_source(self, fullname: str) -> str:
        return importlib.util.decode_source(self._source)


def _import_file(file: Path) -> ModuleType:
    copy = _frozen_copy(file)
    source = (file if copy is None else copy).read_bytes()
    digest = hashlib.sha256(str(file).encode() + b"\0" + source).hexdigest()[:12]
    name = f"rlprompt_user_{file.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    loader = None if copy is None else _CopyLoader(name, str(file), source)
    spec = importlib.util.spec_from_file_location(name, file, loader=loader)
    if spec is None or spec.loader is None:
        raise InputError(f"{file} cannot be loaded as Python source; give a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look their module up
    try:
        with forks_end():
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise InputError(_import_failure(str(file), error, file)) from error
    return module


def _import_module(name: str) -> ModuleType:
    try:
        with forks_end():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(f"{missing}."):
            raise InputError(
                f"there is no module {missing!r}; install it or correct the path"
            ) from error
        raise InputError(_import_failure(f"module {name}", error, None)) from error
    except (Exception, SystemExit) as error:
        raise InputError(_import_failure(f"module {name}", error, None)) from error


def _import_failure(where: str, error: BaseException, file: Path | None) -> str:
    advice = "mend it"
    if isinstance(error, ModuleNotFoundError) and error.name:
        advice = f"install {error.name!r} or correct the import"
        if file is not None and (file.parent / f"{error.name.split('.')[0]}.py").is_file():
            advice = (
                "a file that is named by path cannot import its neighbours: move the code into it "
                "or a package"
            )
    place = user_frame(error, str(file) if file else None)
    return f"importing {where} raised {describe_error(error)} at {place}; {advice}"


def _attribute(module: ModuleType, attribute: str, where: str) -> Any:
    target: Any = module
    for part in attribute.split("."):
        if not hasattr(target, part):
            public = [
                name
                for name, value in vars(target).items()
                if callable(value)
                and not name.startswith("_")
                and getattr(value, "__module__", None) == module.__name__
            ]
            raise InputError(f"{where} has no object {part!r}; {choices(part, public)}")
        target = getattr(target, part)
    return target
