"""`recycle serve`: an OpenAI-compatible server over one family of adapters.

It is an application of its own, on FastAPI with the types of the official `openai` package.
transformers has a server too, but it loads whatever model a request names, runs a thread for each,
and passes over in silence what it does not do, so that nearly every handler would be replaced.

Reading order: `requests.py` (what a request may say), `orders.py` (from there to tokens, within the
limits), `job.py`, `worker.py` and `reader.py` (the one thread that generates, and how it tells text
from tokens), `answers.py` (OpenAI's forms), `gate.py` (who may come in), `app.py` (routes),
`server.py` (start and stop).
"""

from .server import serve
