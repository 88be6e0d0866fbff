"""Pages are made of templates: each is one file that needs nothing else."""

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template

from layerfuse.pages import written_numbers
from layerfuse.palette import DARK, LIGHT, PRINTED


def page_template(package: str, name: str) -> Template:
    """Load a page's template; all that it is given is escaped.

    A page extends `page.html.j2`, which has the stylesheet and the script of all pages, and fills
    its blocks `title` and `content`; `parts.html.j2` has macros for tables and figures.

    Args:
        package: whose folder holds the template, such as `layerfuse.study`.
        name: of the file.

    Returns:
        The template.
    """
    # Strict: a name that the template misspells is an error, not an empty place on the page.
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, "."), PackageLoader("layerfuse.pages", ".")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = written_numbers.percent
    environment.filters["signed"] = written_numbers.signed
    environment.filters["span"] = written_numbers.span
    environment.filters["joined"] = written_numbers.joined
    environment.globals["colors"] = {"light": LIGHT, "dark": DARK, "printed": PRINTED}
    return environment.get_template(name)
