"""Every error that selma_ray raises on purpose.

    SelmaError                  exit code 1
    ├── ConfigError             exit code 2: a recipe, an override or a command line is wrong
    │   ├── SkillError          a skill file is wrong
    │   ├── ModelNotFoundError  a model folder or hub name cannot be opened
    │   └── RunMismatchError    the run folder belongs to another recipe
    ├── ClusterError            Ray cannot be started or reached
    ├── StorageError            the run folder cannot be read or written
    ├── PromptYieldError        a skill cannot reach its number of prompts
    ├── LLMError                the language model keeps dying, refuses or cannot be reached
    ├── DrawingError            a model cannot draw what it is asked for
    ├── RenderError             too many images failed, or a renderer cannot start
    ├── TrainingError           an expert could not be fitted
    ├── AdapterError            a LoRA adapter cannot be read or does not fit
    ├── NoQuestionsError        a prompt has no questions by which its images could be judged
    │   └── CaptionError        a caption is outside the miniature's grammar
    ├── JudgeError              a judge or a question set cannot be used
    └── ServingError            the service cannot start, or refuses a request

Each message is one line: key or file, rule, value, remedy.
"""

__all__ = [
    "AdapterError",
    "CaptionError",
    "ClusterError",
    "ConfigError",
    "DrawingError",
    "JudgeError",
    "LLMError",
    "ModelNotFoundError",
    "NoQuestionsError",
    "PromptYieldError",
    "RenderError",
    "RunMismatchError",
    "SelmaError",
    "ServingError",
    "SkillError",
    "StorageError",
    "TrainingError",
    "first_line",
    "last_line",
    "named_line",
]

_REASON_CHARS = 200


class SelmaError(Exception):
    """An error a user can fix; the command line prints its one line without a traceback."""

    exit_code = 1


class ConfigError(SelmaError):
    """A recipe, an override or a command line breaks a rule."""

    exit_code = 2


class SkillError(ConfigError):
    """A skill file breaks a rule."""


class ModelNotFoundError(ConfigError):
    """A model folder or hub name cannot be opened."""


class RunMismatchError(ConfigError):
    """A run folder was made with a different recipe."""


class ClusterError(SelmaError):
    """Ray cannot be started or reached."""


class StorageError(SelmaError):
    """A run folder cannot be read or written."""


class PromptYieldError(SelmaError):
    """A skill did not reach its number of kept prompts within its bound on requests."""


class LLMError(SelmaError):
    """The language model keeps dying, refuses requests or cannot be reached."""


class DrawingError(SelmaError):
    """A model cannot draw what it is asked for; `field` names what must change, as the fields of a Drawing do."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field

    def __reduce__(self) -> tuple[type["DrawingError"], tuple[str, str]]:
        return type(self), (str(self), self.field)


class RenderError(SelmaError):
    """More than the allowed share of images failed, or a renderer cannot start."""


class TrainingError(SelmaError):
    """An expert could not be fitted."""


class AdapterError(SelmaError):
    """A LoRA adapter cannot be read, or does not fit the model or the other adapters."""


class NoQuestionsError(SelmaError):
    """A prompt has no questions by which its images could be judged."""


class CaptionError(NoQuestionsError):
    """A caption is outside the miniature's grammar."""


class JudgeError(SelmaError):
    """A judge, its answers or its questions cannot be used."""


class ServingError(SelmaError):
    """The HTTP service cannot start, or refuses a request."""


def first_line(error: BaseException | str) -> str:
    """Return the first line with text in it; the class's name of an exception that says nothing."""
    return _lines(error)[0]


def last_line(error: BaseException | str) -> str:
    """Return the last line with text in it, which tells most where a text quotes a traceback, as Ray's errors do."""
    return _lines(error)[-1]


def named_line(error: BaseException) -> str:
    """Return a reason for a table's cell, such as `ValueError: no colour`: class and first line, 200 characters at most."""
    name, line = type(error).__name__, first_line(error)
    return (name if line == name else f"{name}: {line}")[:_REASON_CHARS].rstrip()


def _lines(error: BaseException | str) -> list[str]:
    silent = "" if isinstance(error, str) else type(error).__name__
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [silent]
