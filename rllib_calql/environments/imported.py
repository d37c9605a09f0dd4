"""Modules and classes that a name leads to, and what is wrong where it leads to none."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import gymnasium as gym

from rllib_calql.system.similar_words import close_matches


def imported_module(name: str, what: str) -> ModuleType:
    """Imports a module.

    Args:
        name: Dotted name of the module.
        what: Setting and value that name it, for messages.

    Raises:
        ModuleNotFoundError: If there is none of that name.
        ImportError: If the module raises; with the line that did.
    """
    if name == "__main__":
        return sys.modules["__main__"]
    if not all(part.isidentifier() for part in name.split(".")):
        raise ModuleNotFoundError(
            f"{what} names the module {name!r}, which is no name of a module; write it as behind `import`, with dots "
            "and without a path.",
            name=name,
        )
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            ending = " Write it without `.py`." if name.endswith(".py") else ""
            raise ModuleNotFoundError(
                f"{what} names the module {name!r}, and there is no module {error.name!r}.{ending}"
                f"{close_matches(name, _modules_beside(name))} It must lie in a folder that Python imports from (the "
                "current one, that of the experiment file, those in PYTHONPATH) or be installed.",
                name=error.name,
            ) from error
        raise _failed_import(name, what, error) from error
    except Exception as error:
        raise _failed_import(name, what, error) from error


def attribute_of(module: ModuleType, path: str) -> Any:
    """What stands in a module under a name, dotted for what is inside a class.

    Raises:
        AttributeError: If there is no such thing.
    """
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    return found


def environments_in(module: ModuleType) -> list[str]:
    """Names of the environments' classes that a module defines or imports."""
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and isinstance(value, type) and issubclass(value, gym.Env) and value is not gym.Env
    )


def place_of(error: BaseException) -> str:
    """File, line and text of where an error was raised, as far as it is known."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"'{error.filename}', line {error.lineno}: {(error.text or '').strip()}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_machinery(frame.filename)]
    if not frames:
        return ""
    last = frames[-1]
    return f"'{last.filename}', line {last.lineno}: {(last.line or '').strip()}"


def _failed_import(name: str, what: str, error: Exception) -> ImportError:
    # The line of the module itself, not one deep inside what it imports.
    place = place_of(_from_the_file(name, error))
    remedy = "Mend the module, or install what it imports."
    if isinstance(error, ModuleNotFoundError) and error.name == "gym":
        remedy = "The `gym` package has been replaced by `gymnasium`; write `import gymnasium as gym`."
    return ImportError(
        f"{what} names the module {name!r}, whose import failed: {type(error).__name__}: {error}"
        f"{f' ({place})' if place else ''}. {remedy}"
    )


def _from_the_file(name: str, error: Exception) -> BaseException:
    """The same error, or one whose traceback ends in the named module's own file."""
    try:
        spec = importlib.util.find_spec(name)
    except Exception:  # It imports the packages around the module, which may be what fails.
        return error
    if spec is None or spec.origin is None or isinstance(error, SyntaxError):
        return error
    end: TracebackType | None = error.__traceback__
    own: TracebackType | None = None
    while end is not None:
        if end.tb_frame.f_code.co_filename == spec.origin:
            own = end
        end = end.tb_next
    if own is None:
        return error
    return Exception().with_traceback(TracebackType(None, own.tb_frame, own.tb_lasti, own.tb_lineno))


def _is_machinery(filename: str) -> bool:
    return filename == __file__ or filename.startswith("<frozen importlib") or filename == importlib.__file__


def _modules_beside(name: str) -> list[str]:
    """Modules that lie in the folders of the user on the import path, by the dotted name that imports them."""
    parent, _, _ = name.rpartition(".")
    below = parent.replace(".", "/")
    found: list[str] = []
    for folder in sys.path:
        place = Path(folder or ".", below)
        if "site-packages" in place.parts or place.is_relative_to(sys.base_prefix) or not place.is_dir():
            continue
        names = [path.stem for path in place.glob("*.py")] + [path.parent.name for path in place.glob("*/__init__.py")]
        found += [f"{parent}.{stem}" if parent else stem for stem in names]
    return found
