"""The documentation as tests read it: blocks of code, files that blocks stand for, commands."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = {
    path.stem: path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}


def text(page):
    return PAGES[page].read_text(encoding="utf-8")


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def files(text):
    """Blocks that begin with a comment of their path (yaml: behind the package), by that path."""
    found = {}
    for language in ("python", "yaml"):
        for block in blocks(text, language):
            path = re.match(rf"(?:# @package .+\n)?# (\S+\.{'py' if language == 'python' else 'yaml'})", block)
            if path:
                assert path[1] not in found, path[1]
                found[path[1]] = block
    return found


def write_files(text, folder):
    """Write those blocks where their paths say, under a folder."""
    for path, content in files(text).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content, encoding="utf-8")


def shell_lines(text):
    """Lines of the bash blocks without comments at their end."""
    return [line.split("  #")[0].rstrip() for block in blocks(text, "bash") for line in block.splitlines()]
