"""Text from a family: generate, serve."""

from typing import Annotated

import typer

from recycle.errors import RecycleError

from .app import (
    Compile,
    Moved,
    NumStreams,
    Run,
    app,
    check_model,
    example,
    quiet_libraries,
    standard_input,
)


@app.command(epilog=example('recycle generate runs/demo --prompt "def merge(a, b):" --p 2'))
def generate(
    source: Run,
    prompt: Annotated[str, typer.Option(help="Text to go on with; - reads standard input.")],
    p: NumStreams = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.", min=1)] = 128,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the chat template.")] = False,
    backbone: Moved = None,
    temperature: Annotated[
        float, typer.Option(help="Of sampling; 0 takes the likeliest token each time.", min=0)
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from this share of the probability.", min=0, max=1)
    ] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(help="Of sampling; another each time if not given.", min=0, max=2**63 - 1),
    ] = None,
    compile: Compile = None,
) -> None:
    """Generate text with a finished run, as it comes."""
    from recycle.family.record import check_source

    if not temperature and (top_p < 1 or seed is not None):
        raise RecycleError("--top-p and --seed are of sampling; add --temperature, such as 0.8.")
    check_source(source, p)
    check_model(backbone)
    text = standard_input() if prompt == "-" else prompt
    quiet_libraries()
    from recycle.decode import generate_text

    sampling = (temperature, top_p, seed)
    generate_text(source, text, p, max_new_tokens, chat, backbone, *sampling, compile)


@app.command(epilog=example("recycle serve runs/demo --port 8000"))
def serve(
    source: Run,
    host: Annotated[
        str, typer.Option(help="Where to listen; other machines take a key in RECYCLE_API_KEY.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 is any that is free.", min=0, max=65535)] = 8000,
    max_new_tokens: Annotated[
        int, typer.Option(help="Of a request, at most and by default.", min=1)
    ] = 512,
    backbone: Moved = None,
    compile: Compile = None,
) -> None:
    """Serve each P of a finished run as a model, with OpenAI's interface."""
    from recycle.family.record import check_source

    check_source(source)
    check_model(backbone)
    quiet_libraries()
    from recycle.serve import serve

    serve(source, host, port, max_new_tokens, backbone, compile)
