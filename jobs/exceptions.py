"""Exceptions of this process, of Spark tasks and of workers of the fit as names and text. Standard library only."""

from __future__ import annotations

import re
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

OUR_PACKAGES = ("jobs", "tokenizer", "pipelines", "benchmarks")

# A Python trace in the message of an exception of Spark or of a worker of the fit; its last part may have several
# lines.
_TRACE = re.compile(
    r"Traceback \(most recent call last\):\n(?:[ \t]+[^\n]*\n)+(?P<name>[A-Za-z_][\w.]*)(?:: (?P<text>.*?))?"
    r"(?=\s*\n\s*SQLSTATE|\s*\n\s+at |\n\nThe above exception|\n\nDuring handling|\s*\Z)",
    re.DOTALL,
)
_JAVA_FRAME = re.compile(r"\n\s+(?:at |\.\.\. \d+ more|\d+: )[^\n]*")


@dataclass(frozen=True)
class ExceptionText:
    """An exception of this process, or one that ended a task of Spark or a worker of the fit."""

    names: tuple[str, ...]  # qualified names of its class and parent classes
    text: str
    raised_in: str = ""  # module of the frame that raised it
    task: bool = False

    @staticmethod
    def of(error: BaseException) -> ExceptionText:
        names = tuple(f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__[:-2])
        frames = list(traceback.walk_tb(error.__traceback__))
        where = str(frames[-1][0].f_globals.get("__name__", "")) if frames else ""
        file = getattr(error, "filename", None)
        notes = [*getattr(error, "__notes__", ()), *([f"at {file}"] if isinstance(file, str) else [])]
        return ExceptionText(names or ("BaseException",), "\n".join([str(error), *notes]), where)

    def in_task(self) -> ExceptionText | None:
        """The exception of the task whose trace is in the text; None without a trace."""
        traces = list(_TRACE.finditer(self.text))
        if not traces:
            return None
        name, text = traces[-1]["name"], traces[-1]["text"] or ""
        return ExceptionText(_parents(name), text.strip(), "", task=True)

    @property
    def carries_a_trace(self) -> bool:
        return not self.task and "Traceback (most recent call last)" in self.text

    @property
    def searchable(self) -> str:
        return f"{' '.join(self.names)}: {self.text}\nraised in {self.raised_in}"


def _parents(name: str) -> tuple[str, ...]:
    """The qualified names of a class of this project and its parent classes; of other classes only the name."""
    module, _, kind = name.rpartition(".")
    loaded = sys.modules.get(module)
    if loaded is None and module.split(".")[0] in OUR_PACKAGES:
        import importlib

        loaded = importlib.import_module(module)
    cls = getattr(loaded, kind, None)
    if not isinstance(cls, type):
        return (name,)
    return tuple(f"{parent.__module__}.{parent.__qualname__}" for parent in cls.__mro__)


def chain(error: BaseException) -> list[BaseException]:
    """The exception, its cause, and so on; without a cause the exception during whose handling it was raised."""
    links: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in links:
        links.append(following)
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)
    return links


def detail(error: ExceptionText) -> str:
    """The first line of the text, without Java class names and Spark's advice."""
    text = _JAVA_FRAME.sub("", error.text).removeprefix("An error occurred while calling").strip()
    text = re.sub(r"^\S+\.\n:\s*", "", text)
    text = re.sub(r"^(?:[\w$]+\.)+[\w$]*(?:Exception|Error): ", "", text)
    text = re.sub(r"\(Background on this error at: \S+\)|\s*SQLSTATE: \w+", "", text)
    first = next((line.strip() for line in text.splitlines() if line.strip()), "") or error.names[0]
    return (first if len(first) <= 200 else f"{first[:200]} ...").rstrip(".")


def store_name(root: str) -> str:
    """The name of the MLflow store for a message."""
    own = Path(root, "mlflow.db")
    return str(own) if root and "://" not in root and own.exists() else "(mlflow.tracking_uri)"


def table_or_file(text: str, root: str) -> str:
    """The name of the table or file that an exception is about, for a message."""
    text = text.replace("\\/", "/")
    if root:
        for form in dict.fromkeys((root, quote(root, safe="/:"))):
            match = re.search(re.escape(form) + r"/(?P<name>[^/\s:'\"`,)]+)(?P<rest>(?:/[^\s:'\"`,)]+)*)", text)
            if match:
                name, rest = unquote(match["name"]), unquote(match["rest"]).strip("/").rstrip(".")
                is_table = not name.startswith((".", "_")) and (
                    "_delta_log" in text or "parquet" in text or "DELTA_" in text or not rest
                )
                if is_table and "." not in name:
                    return f"table {name}" + (f" (file {rest})" if rest else "") + f" in {root}"
                return f"{root}/{name}" + (f"/{rest}" if rest else "")
    match = re.search(
        r"""\n?at (?P<note>/[^\n]+)|['"](?P<quoted>/[^'"\n]+)['"]|(?:file:/*|(?<=\s))(?P<bare>/[^\s:'",)]+)""", text
    )
    if match:
        return match["note"] or match["quoted"] or f"/{match['bare'].lstrip('/')}"
    return f"the warehouse {root}" if root else "the file"
