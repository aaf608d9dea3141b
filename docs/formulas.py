"""Formulas become MathML while the site is built: no script, no font, no network."""

import re

from docutils.utils.math.latex2mathml import tex2mathml


def normal(tex):
    "The few commands that docutils' converter does not know, in those that it knows."
    tex = re.sub(r"\\[bB]igg?(?![a-zA-Z])", "", tex)
    tex = re.sub(r"\\dots(?![a-zA-Z])", r"\\ldots", tex)
    return re.sub(r"\\([td]?frac)\s*(\d)(\d)", r"\\\1{\2}{\3}", tex)


def mathml(tex, block):
    return re.sub(r"<mo>([‖|])", r'<mo stretchy="false">\1', tex2mathml(normal(tex), as_block=block))


def inline(self, node):
    tex = node.astext()
    kind = "math wide" if len(tex) > 40 else "math"  # a long one may scroll on a phone
    self.body.append(f'<span class="{kind}">{mathml(tex, False)}</span>')
    raise self.skip


def display(self, node):
    self.body.append(f'<div class="math">{mathml(node.astext(), True)}</div>')
    raise self.skip


def setup(app):
    from docutils.nodes import SkipNode
    from sphinx.writers.html5 import HTML5Translator

    HTML5Translator.skip = SkipNode
    app.add_html_math_renderer("mathml", (inline, None), (display, None))
    return dict(parallel_read_safe=True, parallel_write_safe=True)
