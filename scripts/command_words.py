"""Fire reads the command line; this makes it read what was meant, and run nothing before every word is understood."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

HELP = ("-h", "--help")


class Task:
    """A verb with its arguments, which runs once Fire has understood every word of the command.

    Fire itself would run the verb first, minutes perhaps, and then complain about a word that it cannot place.
    """

    def __init__(self, action: Callable[[], str]) -> None:
        self._action = action


def for_fire(words: Sequence[str], verbs: Mapping[str, Callable[..., Task]]) -> list[str]:
    """Word a command so that Fire takes it as it is meant.

    Help is help behind other words too, where Fire would take it for a setting. And what a verb takes as text is
    quoted, or Fire would make a number of a folder called 2024.10.
    """
    verb = list(words[:1])
    if any(word in HELP for word in words):
        return [*(name for name in verb if name in verbs), "--", "--help"]
    if verb == [] or verb[0] not in verbs:
        return list(words)
    parameters = inspect.signature(verbs[verb[0]]).parameters
    texts = {"", *(name for name, entry in parameters.items() if entry.annotation in (str, str | None))}
    flag = ""  # whose value the next word is; a path stands without one
    for word in words[1:]:
        name, equals, value = word.lstrip("-").partition("=") if word.startswith("--") else (flag, "", word)
        is_text = name.replace("-", "_") in texts
        if equals and is_text:
            verb.append(f"--{name}={value!r}")
        else:
            verb.append(repr(word) if is_text and not word.startswith("-") else word)
        flag = name if word.startswith("--") and not equals else ""
    return verb


def later(verb: Callable[..., str]) -> Callable[..., Task]:
    """Make a task of a verb, with the same arguments and help."""

    @functools.wraps(verb)
    def prepare(*arguments: Any, **settings: Any) -> Task:
        return Task(functools.partial(verb, *arguments, **settings))

    return prepare


def perform(result: Any) -> Any:
    """Run a task and give what it says; without a verb, Fire shows the verbs."""
    return result._action() if isinstance(result, Task) else result
