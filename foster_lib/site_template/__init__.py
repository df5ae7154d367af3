"""What the static site looks like: templates, style sheet, and Markdown with formulas as HTML."""

from pathlib import Path

from pygments.formatters import HtmlFormatter

TEMPLATES = Path(__file__).parent


def style_sheet() -> str:
    """`style.css` and the colours of code, light and dark."""
    light, dark = (HtmlFormatter(style=style).get_style_defs(".highlight") for style in ("default", "github-dark"))
    dark = f"@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"
    return "\n".join([(TEMPLATES / "style.css").read_text(encoding="utf-8"), light, dark])
