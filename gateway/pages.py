"""/openapi.json and /docs: the API's description, for programs and for people.

The page is made here from the same document: no script, no asset from anywhere, so it works offline
and under a Content-Security-Policy that allows nothing but its own style.

Called by: gateway/routes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from typing import Any

from flask import Response
from jinja2 import Environment, StrictUndefined

from headrace.gateway.jobs import json_response

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }
code, pre { font-family: ui-monospace, monospace; font-size: .9em }
pre { background: #8881; overflow: auto; padding: .8rem }
h2 { border-top: 1px solid #8884; padding-top: 1rem }
table { border-collapse: collapse; width: 100% }
td, th { border-bottom: 1px solid #8883; padding: .2rem .6rem .2rem 0; text-align: left;
         vertical-align: top }
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ doc.info.title }} API</title>
<meta name="viewport" content="width=device-width"><style>{{ style }}</style></head><body>
<h1>{{ doc.info.title }} API {{ doc.info.version }}</h1>
<p>{{ doc.info.description }} The same as a document: <a href="/openapi.json">/openapi.json</a>.
Each request but those marked open carries <code>Authorization: Bearer hr_...</code>; errors are
<code>application/problem+json</code> with a stable <code>code</code>.</p>
<pre>curl -H "Authorization: Bearer $KEY" -H "Content-Type: application/json" \\
     -d '{"model": "NAME", "prompt": "Once upon a time"}' http://HOST/v1/jobs</pre>
{% macro kind(schema) -%}
{% if '$ref' in schema %}<a href="#{{ schema['$ref'].split('/')[-1] }}">
{{- schema['$ref'].split('/')[-1] }}</a>
{%- elif 'enum' in schema %}{{ schema.enum | join(' | ') }}
{%- elif 'const' in schema %}{{ schema.const }}
{%- elif 'anyOf' in schema %}
{%- for one in schema.anyOf %}{{ kind(one) }}{{ ' or ' if not loop.last }}{% endfor %}
{%- elif schema.get('type') == 'array' %}list of {{ kind(schema['items']) }}
{%- else %}{{ schema.get('format') or schema.get('type', 'any') }}
{%- for word in ('minimum', 'exclusiveMinimum', 'maximum', 'maxLength', 'maxItems') %}
{%- if word in schema %}, {{ word }} {{ schema[word] }}{% endif %}{% endfor %}
{%- endif %}
{%- endmacro %}
{% for path, methods in doc.paths.items() %}{% for method, op in methods.items() %}
<h2 id="{{ op.operationId }}"><code>{{ method | upper }} {{ path }}</code></h2>
<p>{{ op.summary }}{% if op.security is defined %} (open){% endif %}</p>
{% if op.parameters %}<table>{% for p in op.parameters %}<tr><td><code>{{ p.name }}</code></td>
<td>{{ p['in'] }}</td><td>{{ kind(p.schema) }}</td><td>{{ p.get('description', '') }}</td></tr>
{% endfor %}</table>{% endif %}
{% if op.requestBody is defined %}
<p>Body: {{ kind(op.requestBody.content['application/json'].schema) }}</p>{% endif %}
<p>Answers: {% for status, answer in op.responses.items() %}{{ status }}
{% for media, content in answer.content.items() %}
{%- if media == 'application/json' %}{{ kind(content.schema) }}
{%- elif media != 'application/problem+json' %}{{ media }}{% else %}Problem{% endif %}
{%- endfor %}{{ ', ' if not loop.last }}{% endfor %}</p>
{% endfor %}{% endfor %}
{% for name, schema in doc.components.schemas.items() %}{% if schema.properties is defined %}
<h2 id="{{ name }}">{{ name }}</h2><p>{{ schema.get('description', '') }}</p>
<table>{% for field, one in schema.properties.items() %}<tr><td><code>{{ field }}</code></td>
<td>{{ kind(one) }}</td><td>{{ 'required' if field in schema.get('required', []) }}</td>
<td>{{ one.get('description', '') }}</td></tr>{% endfor %}</table>{% endif %}{% endfor %}
</body></html>
"""


class PageRoutes:
    """The views of the document; it is made when first asked for."""

    def __init__(self, make_document: Callable[[], dict[str, Any]]) -> None:
        self._make_document = make_document
        self._document: dict[str, Any] | None = None
        self._page = ""

    def openapi(self) -> Response:
        return json_response(self._cached())

    def docs(self) -> Response:
        if not self._page:
            environment = Environment(autoescape=True, undefined=StrictUndefined)
            template = environment.from_string(PAGE)
            self._page = template.render(doc=self._cached(), style=STYLE)
        response = Response(self._page, mimetype="text/html")
        digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
        response.headers["Content-Security-Policy"] = (
            f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; "
            "form-action 'none'; frame-ancestors 'none'"
        )
        return response

    def _cached(self) -> dict[str, Any]:
        if self._document is None:
            self._document = self._make_document()
        return self._document
