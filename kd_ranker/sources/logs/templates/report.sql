-- What the data report counts in the tables of `log.sql`.

-- 1. Values of columns: all, missing and invalid. Features of items count once per item, those of
-- users and the context once per request.
{% macro counts(key, known, bad="") %}
    count(*) AS "{{ key }}/values", count(*) - count({{ known }}) AS "{{ key }}/missing",
    {% if bad %}count(*) FILTER (WHERE {{ bad }}){% else %}0{% endif %} AS "{{ key }}/out_of_range",
{% endmacro %}
{% macro id_counts(key, column, value="") %}
{% set id = id(column, value or logged(column)) %}
{% if is_float(column) %}
{% set known = number(column, value) %}
{{ counts(key, known, known ~ " IS NOT NULL AND (" ~ id ~ ") IS NULL") }}
{%- else %}
{{ counts(key, id) }}
{%- endif %}
{%- endmacro %}
{% macro number_counts(key, column, low, high, value="") %}
{% set known = number(column, value) %}
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
{%- if has_zones(columns.time) %}
    count(*) FILTER (WHERE {{ has_zone(columns.time) }}) AS "columns.time/with_zone",
{% endif %}
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
{% set stage = code(columns.stage, layout.stages) %}
{{ counts("columns.stage", stage, stage ~ " = 0") }}
{%- endif %}
{% if columns.position %}
{% set place = "nullif(" ~ number(columns.position) ~ ", " ~ no_place ~ ")" %}
{{ counts("columns.position", place, place ~ " < 0 OR " ~ place ~ " > " ~ largest) }}
{%- endif %}
{% for use, low in [("label_weight", 0), ("teacher_weight", 0), ("propensity", -largest),
                    ("incumbent", 0 if layout.incumbent_signal == "rank" else -largest)] if columns[use] %}
{{ number_counts("columns." ~ use, columns[use], low, largest) }}
{%- endfor %}
{% for column in layout.early_scores %}
{{ number_counts("columns.early_scores: " ~ column, column, -largest, largest) }}
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
{% set labeled = "stage = 3 AND label_weight > 0" %}
CREATE TABLE totals AS
    WITH weighed AS (SELECT split, stage, CASE WHEN {{ labeled }} THEN label_weight::DOUBLE END AS weight
    {% for task in layout.tasks %}
        , "label:{{ task }}"
    {% endfor %}
    {% for task in layout.scored_tasks %}
        , CASE WHEN "teacher:{{ task }}" BETWEEN {{ layout.teacher_range[0] }} AND {{ layout.teacher_range[1] }}
            AND teacher_weight > 0 THEN "teacher:{{ task }}"::DOUBLE END AS "teacher:{{ task }}"
    {% endfor %}
        FROM used),
    of_stages AS (SELECT split, stage, count(*) AS candidates, count(weight) AS labeled, sum(weight) AS weight
    {% for task in layout.tasks %}{% set is_one = 'FILTER (WHERE "label:' ~ task ~ '" = 1)' %}
        , count(*) {{ is_one }} AS "ones/{{ task }}", count(weight) {{ is_one }} AS "positives/{{ task }}",
        sum(weight) {{ is_one }} AS "weight/{{ task }}"
    {% endfor %}
    {% for task in layout.scored_tasks %}
        , min("teacher:{{ task }}") AS "lowest/{{ task }}", max("teacher:{{ task }}") AS "highest/{{ task }}",
        count("teacher:{{ task }}") AS "scored/{{ task }}", sum(weight * "teacher:{{ task }}") AS "sum/{{ task }}",
        sum(weight * "label:{{ task }}") FILTER (WHERE "teacher:{{ task }}" IS NOT NULL) AS "observed/{{ task }}"
    {% endfor %}
    {% if layout.scored_tasks %}
        , count(*) FILTER (WHERE {% for task in layout.scored_tasks %}"teacher:{{ task }}" IS NOT NULL
            {{- " AND " if not loop.last }}{% endfor %}) AS scored
    {% endif %}
        FROM weighed GROUP BY split, stage)
    SELECT split, sum(candidates)::BIGINT AS candidates,
    {% for stage in ("retrieved", "passed", "shown") %}{% set here = "FILTER (WHERE stage = " ~ loop.index ~ ")" %}
        coalesce(sum(candidates) {{ here }}, 0)::BIGINT AS {{ stage }},
        {% for task in layout.scored_tasks %}
        sum("scored/{{ task }}") {{ here }} / sum(candidates) {{ here }} AS "coverage/{{ task }}/{{ stage }}",
        {% endfor %}
    {% endfor %}
    {% for task in layout.tasks %}
        sum("positives/{{ task }}")::BIGINT AS "positives/{{ task }}",
        coalesce(sum("weight/{{ task }}"), 0) / sum(weight) AS "rate/{{ task }}",
        coalesce(sum("ones/{{ task }}") FILTER (WHERE stage < 3), 0)::BIGINT AS "positives_not_shown/{{ task }}",
    {% endfor %}
    {% for task in layout.scored_tasks %}
        min("lowest/{{ task }}") AS "lowest/{{ task }}", max("highest/{{ task }}") AS "highest/{{ task }}",
    {% endfor %}
    {% if layout.scored_tasks %}
        sum(scored) / sum(candidates) AS scored_share,
    {% endif %}
    {% for task in layout.scored_tasks if layout.teacher_signal == "probability" %}
        sum("sum/{{ task }}") / nullif(sum("observed/{{ task }}"), 0) AS "predicted_over_observed/{{ task }}",
    {% endfor %}
        sum(labeled)::BIGINT AS labeled FROM of_stages GROUP BY split;
CREATE TABLE sizes AS
    WITH of_requests AS (SELECT number, split, count(*) AS size,
        count(*) FILTER (WHERE {{ labeled }}) AS labels,
        count(*) FILTER (WHERE teacher_weight > 0
    {% for task in layout.scored_tasks %}
            AND "teacher:{{ task }}" BETWEEN {{ layout.teacher_range[0] }} AND {{ layout.teacher_range[1] }}
    {% endfor %}
        ) AS scored, count(*) FILTER (WHERE stage >= 2) AS passed FROM used GROUP BY number, split)
    SELECT split, size, count(*) AS requests, count(*) FILTER (WHERE labels = 0) AS without_label,
        count(*) FILTER (WHERE scored >= {{ least_whole }} * size) AS whole,
        count(*) FILTER (WHERE scored >= {{ least_whole }} * size AND size > passed) AS whole_beyond
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
    (SELECT max(number) FROM (SELECT count(*) AS number FROM requests GROUP BY usr))
        AS requests_of_one_user,
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
    FROM (SELECT * FROM request_rows
        WHERE number % greatest(1, ((SELECT count(*) FROM used) + 99999) // 100000) = 0) AS request_rows
    JOIN used USING (number) JOIN items USING (item);
