-- What the data report counts in the tables of `log.sql`.

-- 1. Values of columns: all, missing and invalid. Features of items count once per item, those of
-- users and the context once per request.
{% macro counts(key, known, bad="false") %}
    count(*) AS "{{ key }}/values",
    count(*) FILTER (WHERE {{ known }} IS NULL AND NOT coalesce({{ bad }}, false)) AS "{{ key }}/missing",
    count(*) FILTER (WHERE coalesce({{ bad }}, false)) AS "{{ key }}/out_of_range",
{% endmacro %}
{% macro id_counts(key, column, value="") %}
{% set value = value or logged(column) %}
{% set known = "(" ~ id(column, value) ~ ")" %}
{{ counts(key, known, known ~ " IS NULL AND NOT isnan(" ~ value ~ ")" if is_float(column) else "false") }}
{%- endmacro %}
{% macro number_counts(key, column, low, high, value="") %}
{% set known = "(" ~ number(column, value) ~ ")" %}
{{ counts(key, known, known ~ " < " ~ low ~ " OR " ~ known ~ " > " ~ high) }}
{%- endmacro %}
{% macro feature_counts(features, is_raw) %}
{% for feature in features %}
{% set key, column = "features." ~ feature.key, feature.column %}
{% set value = raw(column) if is_raw else logged(column) %}
{% if feature.place %}{# the first number of a vector counts for all #}
{% elif feature.of == "event" %}
{{ counts(key, value, "NOT (" ~ is_aligned(value, raw(layout.history.column)) ~ ")") }}
{%- elif feature.place == 0 %}
{{ counts(key, value, "array_length(" ~ value ~ ") <> " ~ feature.length) }}
{%- elif feature.kind == "dense" %}
{{ number_counts(key, column, -largest, largest, value) }}
{%- elif feature.kind == "category" %}
{{ id_counts(key, column, value) }}
{%- else %}
{% set kept = "coalesce(array_length(" ~ ids_in(column, value) ~ "), 0)" %}
    count(*) AS "{{ key }}/values",
    count(*) FILTER (WHERE {{ kept }} = 0) AS "{{ key }}/missing",
    sum(coalesce(array_length({{ value }}), 0) - {{ kept }})::BIGINT AS "{{ key }}/out_of_range",
{% endif %}
{% endfor %}
{% endmacro %}
{% macro of_rows() %}
{{ id_counts("columns.request", columns.request) }}
{%- if columns.user %}
{{ id_counts("columns.user", columns.user) }}
{%- endif %}
{% set time = logged(columns.time) %}
{{ counts("columns.time", time, seconds(columns.time) ~ " IS NULL AND " ~ time ~ " IS NOT NULL") }}
{% endmacro %}
{% if layout.by_request %}
CREATE TABLE faults_of_rows AS SELECT
{{ of_rows() }}
    sum(greatest(coalesce({{ length(columns.item) }}, 0), 1))::BIGINT AS entries,
    count(*) AS rows FROM log;
{% endif %}
CREATE TABLE faults_of_candidates AS SELECT
{% if not layout.by_request %}
{{ of_rows() }}
{%- endif %}
{{ id_counts("columns.item", columns.item) }}
{%- if columns.stage %}
{{ counts("columns.stage", logged(columns.stage), code(columns.stage, layout.stages) ~ " = 0") }}
{%- endif %}
{% for use, low in [("position", 0), ("label_weight", 0), ("teacher_weight", 0), ("propensity", -largest),
                    ("incumbent", 0 if layout.incumbent_signal == "rank" else -largest)] if columns[use] %}
{{ number_counts("columns." ~ use, columns[use], low, largest) }}
{%- endfor %}
{% for task, column in layout.labels.items() %}
{% set number_of_label = "(" ~ label_number(column) ~ ")" %}
{{ counts("labels." ~ task, number_of_label, number_of_label ~ " NOT IN (0, 1)") }}
{%- endfor %}
{% for task in layout.scored_tasks %}
{{ number_counts("teacher." ~ task, layout.teacher[task], *layout.teacher_range) }}
{%- endfor %}
{{ feature_counts(layout.of("candidate"), false) }}
{%- if other_version() %}
    count(*) FILTER (WHERE {{ other_version() }} AND ({% for column in layout.teacher.values() %}
        {{ number(column) }} IS NOT NULL OR {% endfor %} false)) AS other_version,
{% endif %}
    count(*) AS rows FROM unfolded;
CREATE TABLE faults_of_items AS SELECT
{{ feature_counts(layout.of("item"), true) }} count(*) AS rows FROM items;
CREATE TABLE faults_of_requests AS SELECT
{{ feature_counts(layout.of("user", "context", "event"), true) }} count(*) AS rows FROM request_rows;

-- 2. Requests, and items, with different values of a feature. The hash of all features finds most
-- of them at one look at each row.
{% macro varying(table, keys, features, rows) %}
{% set values, by = names(features | map(attribute="column") | unique), keys | join(", ") %}
CREATE TABLE {{ table }} AS
    WITH log AS (SELECT {% for key in keys %}{{ id(columns[key]) }} AS {{ key }}, {% endfor %}
        {{ values }} FROM {{ rows }}),
    different AS (SELECT {{ by }} FROM log GROUP BY {{ by }}
        HAVING min(hash({{ values }})) <> max(hash({{ values }}))),
    valued AS (SELECT {% for key in keys %}log.{{ key }}, {% endfor %}
        {% for feature in features %}
        {% set value = feature_value(feature) %}
        {% if feature.kind == "bag" %}{# which has no order #}
        {% set value = "CASE WHEN array_length(" ~ value ~ ") > 0 THEN array_sort(" ~ value ~ ") END" %}
        {% endif %}
        {{ value }} AS f{{ loop.index0 }}{{ "," if not loop.last }}
        {% endfor %}
        FROM log SEMI JOIN different USING ({{ by }})
        {% if "request" in keys %}
        SEMI JOIN (SELECT request, usr AS user FROM requests) AS known USING ({{ by }})
        {% endif %}),
    varies AS (SELECT {% for feature in features %}{% set f = "f" ~ loop.index0 %}
        min({{ f }}) <> max({{ f }}) OR (count({{ f }}) > 0 AND count({{ f }}) < count(*)) AS {{ f }}
        {{- "," if not loop.last }}
        {% endfor %} FROM valued GROUP BY {{ by }})
    SELECT {% for feature in features %}
        count(*) FILTER (WHERE coalesce(f{{ loop.index0 }}, false)) AS "{{ feature.name }}"
        {{- "," if not loop.last }}
        {% endfor %} FROM varies;
{% endmacro %}
{% set of_requests = layout.of("user", "context") | selectattr("kind", "in", ("dense", "category")) | list %}
{% if of_requests %}
{% set keys = ["request", "user"] if columns.user else ["request"] %}
{{ varying("varying_requests", keys, of_requests, "log") }}
{% endif %}
{% if layout.of("item") %}
{{ varying("varying_items", ["item"], layout.of("item"), "unfolded") }}
{% endif %}

-- 3. Sums over what is used.
{% set labelled = "stage = 3 AND label_weight > 0" %}
{% macro proper(task) %}
"teacher:{{ task }}" BETWEEN {{ layout.teacher_range[0] }} AND {{ layout.teacher_range[1] }} AND teacher_weight > 0
{%- endmacro %}
CREATE TABLE totals AS SELECT split, count(*) AS candidates,
    count(*) FILTER (WHERE stage = 1) AS retrieved, count(*) FILTER (WHERE stage = 2) AS passed,
    count(*) FILTER (WHERE {{ labelled }}) AS labelled,
{% for task in layout.tasks %}
    count(*) FILTER (WHERE {{ labelled }} AND "label:{{ task }}" = 1) AS "positives/{{ task }}",
    coalesce(sum(label_weight::DOUBLE) FILTER (WHERE {{ labelled }} AND "label:{{ task }}" = 1), 0)
        / nullif(sum(label_weight::DOUBLE) FILTER (WHERE {{ labelled }}), 0) AS "rate/{{ task }}",
    count(*) FILTER (WHERE stage < 3 AND "label:{{ task }}" = 1) AS "positives_not_shown/{{ task }}",
{% endfor %}
{% for task in layout.scored_tasks %}
    {% for stage in ("retrieved", "passed", "shown") %}
    count(*) FILTER (WHERE stage = {{ loop.index }} AND {{ proper(task) }})
        / nullif(count(*) FILTER (WHERE stage = {{ loop.index }}), 0) AS "coverage/{{ task }}/{{ stage }}",
    {% endfor %}
    {% if layout.teacher_signal == "probability" %}
    {% for value in ("teacher:" ~ task, "label:" ~ task) %}
    {{ "/ nullif(" if not loop.first }} sum(label_weight::DOUBLE * "{{ value }}"::DOUBLE)
        FILTER (WHERE {{ labelled }} AND {{ proper(task) }}) {{ ", 0)" if not loop.first }}
    {% endfor %}
        AS "predicted_over_observed/{{ task }}",
    {% endif %}
{% endfor %}
    count(*) FILTER (WHERE stage = 3) AS shown FROM used GROUP BY split;
CREATE TABLE sizes AS
    WITH of_requests AS (SELECT number, split, count(*) AS size,
        count(*) FILTER (WHERE {{ labelled }}) AS labels FROM used GROUP BY number, split)
    SELECT split, size, count(*) AS requests, count(*) FILTER (WHERE labels = 0) AS without_label
        FROM of_requests GROUP BY split, size;
CREATE TABLE splits AS SELECT split, count(*) AS requests, min(time) AS first, max(time) AS last,
    count(*) FILTER (WHERE moved) AS several_times
    FROM requests GROUP BY split;
{% for table, features, where in [("used", layout.of("candidate", kind="dense"), "split = 0"),
        ("request_rows", layout.of("user", "context", kind="dense"), "split = 0"),
        ("items", layout.of("item", kind="dense"), "train > 0")] if features %}
CREATE TABLE moments_of_{{ table }} AS SELECT
    {% for feature in features %}{% set x = '"feature:' ~ feature.name ~ '"' %}
    count({{ x }}) AS "{{ feature.name }}/number", favg({{ x }}) AS "{{ feature.name }}/mean",
    stddev_pop({{ x }}) AS "{{ feature.name }}/deviation"{{ "," if not loop.last }}
    {% endfor %}
    FROM {{ table }} WHERE {{ where }};
{% endfor %}

-- 4. Ids.
CREATE TABLE ids AS SELECT
    (SELECT count(*) FROM users) AS users,
    (SELECT count(*) FROM users WHERE train = 0) AS users_not_in_train,
    (SELECT count(*) FROM items) AS items,
    (SELECT count(*) FROM items WHERE train = 0) AS items_not_in_train;
{% if layout.history %}
CREATE TABLE events AS
    WITH events AS (SELECT unnest("feature:{{ layout.history.name }}") AS event FROM request_rows)
    SELECT count(*) AS history_events,
        count(*) FILTER (WHERE value IS NULL) AS history_events_of_unknown_items
        FROM events LEFT JOIN (SELECT value FROM items
            {% if known_size %} UNION SELECT value FROM known_item {% endif %}) ON event = value;
{% endif %}
{% if columns.propensity %}
CREATE TABLE propensities AS
    WITH shown AS (SELECT propensity, propensity <= 0 OR propensity > 1 AS bad FROM used WHERE stage = 3)
    SELECT count(*) AS shown, count(*) FILTER (WHERE bad) AS bad,
        min(propensity) FILTER (WHERE bad) AS least FROM shown;
{% endif %}

-- 5. Some 100,000 candidates of whole requests, to see what a feature reveals.
CREATE TABLE sampled AS SELECT used.number, used.stage
{% for task in layout.tasks %}
    , CASE WHEN stage = 3 AND "label:{{ task }}" >= 0 THEN "label:{{ task }}" END AS "label:{{ task }}"
{% endfor %}
{% for task in layout.scored_tasks %}
    , used."teacher:{{ task }}"
{% endfor %}
{% for feature in layout.of("user", "context", "item", "candidate")
       if feature.kind in ("dense", "category") and feature.place is none %}
    {% set table = {"candidate": "used", "item": "items"}.get(feature.of, "request_rows") %}
    , {{ table }}."feature:{{ feature.name }}"
{% endfor %}
    FROM used JOIN request_rows USING (number) JOIN items ON used.item = items.value
    WHERE number % greatest(1, ((SELECT count(*) FROM used) + 99999) // 100000) = 0;
