"""Open a report in headless Chromium: at 400 and 1600 pixels, light and dark.

    python scripts/check_report.py runs/demo/report.html --out shots

Fails where the console says anything or the page is wider than its window, and writes screenshots
to look at. Needs the command `chromium` (Debian: apt install chromium), and is skipped without it.
"""

import argparse
import html
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

WIDTHS, SCHEMES = (400, 1600), {"dark": 0, "light": 1}
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-sync", "--disable-background-networking", "--disable-component-update"),
    *("--hide-scrollbars", "--enable-logging=stderr"),
)
# A window of a headless browser is 500 pixels wide or more, and a frame is not.
FRAME = """<iframe style="width: {width}px; height: 1000px; border: 0" srcdoc="{page}"></iframe>
<script>
onload = () => {{
  const root = document.querySelector('iframe').contentDocument.documentElement;
  document.body.setAttribute('data-sizes', root.scrollWidth + ' ' + root.scrollHeight);
}};
</script>"""


def browse(page: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Open a page, given as text, in a browser that knows nothing from before."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        path.write_text(page, encoding="utf-8")
        return subprocess.run(
            ["chromium", *FLAGS, f"--user-data-dir={folder}/profile", *flags, path.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
        )


def check(report: Path, out: Path) -> list[str]:
    """Write the screenshots; returns what is wrong."""
    problems = []
    page = report.read_text(encoding="utf-8").replace("<details>", "<details open>")
    for width in WIDTHS:
        framed = FRAME.format(width=width, page=html.escape(page))
        dom = browse(framed, "--window-size=1800,1000", "--dump-dom").stdout
        found = re.search(r'data-sizes="(\d+) (\d+)"', dom)
        assert found is not None, f"chromium gave no page: {dom[:200]}"
        wide, high = map(int, found.groups())
        if wide > width:
            problems.append(f"the page is {wide} pixels wide in a window of {width}")
        for scheme, number in SCHEMES.items():
            shot = out / f"{report.stem}-{width}-{scheme}.png"
            done = browse(
                page,
                f"--window-size={width},{high}",
                f"--blink-settings=preferredColorScheme={number}",
                f"--screenshot={shot.resolve()}",
            )
            said = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
            problems += [f"{width} {scheme}: {line}" for line in said]
            if not shot.is_file():
                problems.append(f"{width} {scheme}: no screenshot: {done.stderr[-300:]}")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", nargs="+", type=Path, metavar="REPORT.html")
    parser.add_argument("--out", type=Path, default=Path("shots"), help="folder of the screenshots")
    arguments = parser.parse_args()
    if shutil.which("chromium") is None:
        print("Skipped: there is no chromium here. On Debian: apt install chromium")
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    problems = [f"{x}: {y}" for x in arguments.reports for y in check(x, arguments.out)]
    sys.exit("\n".join(problems) or None)


if __name__ == "__main__":
    main()
