-- Requests of a log. Starts from the view `log`: its own columns as "log:<name>", and `file` and `row`,
-- the place of a row. `query.py` renders it: functions such as `number`, `id` and `feature_value` are the
-- public methods of its `Query`. `docs/own_logs.md` explains the rules.

-- Rows with `ordinal`, their place in an order, from 1. The order is that of groups, then of the rows in
-- each: an engine of several machines would sort all rows in one task for a window over all of them.
{% macro numbered(rows, group, groups, order) %}
    SELECT *, before + row_number() OVER (PARTITION BY {{ group }} ORDER BY {{ order }}) AS ordinal
        FROM {{ rows }} JOIN (SELECT {{ group }},
                sum(count(*)) OVER (ORDER BY {{ groups }})::BIGINT - count(*) AS before
            FROM {{ rows }} GROUP BY {{ group }}) AS grouped USING ({{ group }})
{%- endmacro %}

-- A number if it is in [low, the largest of 32 bits], else NULL.
{% macro within(column, low) %}
CASE WHEN {{ number(column) }} BETWEEN {{ low }} AND {{ largest }} THEN {{ number(column) }} END
{%- endmacro %}
-- A number in half the memory; one too large for it is infinite.
{% macro in_32_bits(column) %}
CASE WHEN {{ number(column) }} > {{ largest }} THEN 'inf'::FLOAT
            WHEN {{ number(column) }} < -{{ largest }} THEN '-inf'::FLOAT ELSE ({{ number(column) }})::FLOAT END
{%- endmacro %}

-- 1. Candidates: one row each, as logged. `place` is that in the lists of a row, else -1.
{% if layout.by_request %}
CREATE VIEW listed AS SELECT file, "row", {{ names(wanted) }},
    coalesce({{ length(columns.item) }}, 0) AS entries,
    CASE WHEN coalesce({{ length(columns.item) }}, 0) = 0 THEN 'no_candidates'
    {% for column in lists %}
         WHEN {{ length(column) }} <> {{ length(columns.item) }} THEN 'lists_differ'
    {% endfor %}
    END AS why FROM log;
{% if layout.engine == "spark" %}
CREATE VIEW unfolded AS /* spark */ SELECT file, row
    {% for column in scalars %}, `log:{{ column }}`{% endfor %},
    inline(arrays_zip(transform(sequence(1, entries), each -> each - 1), `log:{{ columns.item }}`
        {% for column in lists %}
        , coalesce(`log:{{ column }}`, array_repeat(NULL, CAST(entries AS INT)))
        {% endfor %}))
        AS (place, `log:{{ columns.item }}`{% for column in lists %}, `log:{{ column }}`{% endfor %})
    FROM listed WHERE why IS NULL;
{% else %}
-- By [:] a list inside of a list is a copy, which DuckDB hashes in a tenth of the time.
CREATE VIEW unfolded AS SELECT file, "row"{{ and_names(scalars) }},
    unnest(range(entries)) AS place, unnest({{ logged(columns.item) }}) AS {{ logged(columns.item) }}
    {% for column in lists %}
    , unnest({{ logged(column) }}){{ "[:]" if column in nested }} AS {{ logged(column) }}
    {% endfor %}
    FROM listed WHERE why IS NULL;
{% endif %}
{% else %}
CREATE VIEW unfolded AS SELECT file, "row", (-1)::BIGINT AS place, {{ names(wanted) }} FROM log;
{% endif %}

-- 2. Each value in its type, or NULL; and why a row is rejected. A label of -1 is missing, one of
-- -2 is invalid; stage 0 is unknown, 1 retrieved, 2 passed, 3 shown. `item` is the place of an id in the
-- order of all: tables of texts take longer to write, to join and to sort. On Spark it is the id.
{% set has_names = layout.engine == "duckdb" %}
{% if has_names %}
CREATE TABLE names AS SELECT value, (row_number() OVER (ORDER BY value))::INT AS item
    FROM (SELECT DISTINCT {{ id(columns.item) }} AS value FROM unfolded) AS ids WHERE value IS NOT NULL;
{% endif %}
{% set place = (within(columns.position, 0) if columns.position else "NULL") ~ "::FLOAT" %}
{% set stage = code(columns.stage, layout.stages) if columns.stage %}
CREATE TABLE staged AS
    WITH valued AS (SELECT file, "row", place,
        {{ id(columns.user) if columns.user else "0::BIGINT" }} AS usr,
        {{ "item" if has_names else id(columns.item) ~ " AS item" }},
        {{ seconds(columns.time) if columns.time else "0::BIGINT" }} AS time,
        {{ place }} AS position,
    {% for task in layout.tasks %}
        {% set label = label_number(labels[task]) if labels[task] else "NULL" %}
        CASE WHEN {{ label }} IN (0, 1) THEN {{ label }} WHEN {{ label }} IS NULL THEN -1 ELSE -2
        END::TINYINT AS "label:{{ task }}",
    {% endfor %}
    {% for task in layout.scored_tasks %}
        {{ in_32_bits(layout.teacher[task]) }} AS "teacher:{{ task }}",
    {% endfor %}
    {% if columns.label_weight %}
        CASE WHEN {{ number(columns.label_weight) }} IS NULL THEN 1
            ELSE coalesce({{ within(columns.label_weight, 0) }}, 0) END
    {% else %} 1 {% endif %}::FLOAT AS label_weight,
        CASE WHEN {{ other_version() or "false" }} THEN 0
    {% if columns.teacher_weight %}
            ELSE coalesce({{ within(columns.teacher_weight, 0) }}, 0)
    {% else %} ELSE 1 {% endif %} END::FLOAT AS teacher_weight,
    {% if "incumbent" in facts %}
        {% set by_rank = layout.incumbent_signal == "rank" %}
        {{ "-" if by_rank }}({{ within(columns.incumbent, 0 if by_rank else -largest) }})::FLOAT AS incumbent,
    {% endif %}
    {% if "propensity" in facts %}
        {{ in_32_bits(columns.propensity) }}::FLOAT AS propensity,
    {% endif %}
    {% for field, column in early_scores.items() %}
        ({{ within(column, -largest) }})::FLOAT AS {{ name(field) }},
    {% endfor %}
    {% for feature in layout.of("candidate") %}
        {{ feature_value(feature) }} AS "feature:{{ feature.name }}",
    {% endfor %}
    {% if layout.split == "column" %}
        {{ code(columns.split, split_codes) }} - 1 AS logged_split,
    {% endif %}
    {% if stage and 3 in layout.stages.values() %}
        {{ stage }} AS stage,
    {% elif stage %}
        CASE WHEN {{ place }} IS NOT NULL THEN 3 ELSE {{ stage }} END::TINYINT AS stage,
    {% endif %}
        {{ id(columns.request) }} AS request FROM unfolded
        {% if has_names %}LEFT JOIN names ON value = {{ id(columns.item) }}{% endif %})
    SELECT *
    {% if not stage %}
        , CASE WHEN position IS NOT NULL
             {% for task in layout.tasks %} OR "label:{{ task }}" <> -1{% endfor %} THEN 3
        {% for task in layout.scored_tasks %}
             WHEN "teacher:{{ task }}" IS NOT NULL THEN 2
        {% endfor %}
             ELSE 1 END::TINYINT AS stage
    {% endif %}
        FROM valued;
CREATE VIEW typed AS
    SELECT *, CASE WHEN request IS NULL THEN 'missing_request' WHEN time IS NULL THEN 'missing_time'
        WHEN usr IS NULL THEN 'missing_user' WHEN item IS NULL THEN 'missing_item'
        WHEN stage = 0 THEN 'unknown_stage'
    {% for task in layout.tasks %}
        WHEN "label:{{ task }}" = -2 THEN 'bad_label'
    {% endfor %}
        END AS why FROM staged;

-- 3. Requests: each is of the user of most rows, at its earliest time. The times of requests that
-- lose all rows still count for the split: a fault must not move the other requests.
CREATE TABLE times AS SELECT request, min(time) AS time, max(time) AS last FROM typed
    WHERE request IS NOT NULL AND time IS NOT NULL GROUP BY request;
CREATE TABLE too_long AS SELECT request FROM times WHERE last - time > {{ layout.longest }};
CREATE VIEW good AS SELECT typed.* FROM typed ANTI JOIN too_long USING (request) WHERE why IS NULL;
CREATE TABLE owners AS
    WITH users AS (SELECT request, usr, count(*) AS candidates,
        min(file * {{ rows_of_a_file }} + "row") AS first,
        min(time) AS first_time, max(time) AS last_time
    {% if layout.split == "column" %}
        , min(logged_split) AS logged_split
    {% endif %}
        FROM good GROUP BY request, usr),
    ranked AS (SELECT *, count(*) OVER (PARTITION BY request) AS users,
        row_number() OVER (PARTITION BY request ORDER BY candidates DESC, usr) AS turn FROM users)
    SELECT * FROM ranked WHERE turn = 1;
{% if layout.split == "column" %}
CREATE TABLE bad_splits AS SELECT request FROM good GROUP BY request
    HAVING min(logged_split) < 0 OR min(logged_split) <> max(logged_split);
{% elif layout.split == "time" %}
-- The test begins with the first of the last requests that are its share, the validation with
-- those of both shares. Requests of one second are on the same side, and each split has a second.
CREATE TABLE seconds AS SELECT time, sum(count(*)) OVER (ORDER BY time)::BIGINT AS requests,
    row_number() OVER (ORDER BY time) AS turn FROM times GROUP BY time;
CREATE TABLE cutoffs AS
    WITH sizes AS (SELECT max(requests) AS requests, max(turn) AS seconds FROM seconds),
    tests AS (SELECT greatest(max(CASE WHEN turn = 3 THEN time END), min(CASE WHEN seconds.requests >
            sizes.requests - greatest(1, round_even({{ layout.test_share }} * sizes.requests, 0))
            THEN time END)) AS test FROM seconds CROSS JOIN sizes)
    SELECT least(max(CASE WHEN time < test THEN time END), greatest(
            max(CASE WHEN turn = 2 THEN time END), min(CASE WHEN seconds.requests > sizes.requests -
            greatest(1, round_even({{ layout.validation_share + layout.test_share }} * sizes.requests, 0))
            THEN time END))) AS validation, max(test) AS test
        FROM seconds CROSS JOIN sizes CROSS JOIN tests WHERE sizes.seconds > 2;
{% endif %}
-- Requests are numbered in the order of time, by days. A log to score keeps the order of its files.
CREATE TABLE requests AS
    WITH timed AS (SELECT owners.*, times.time,
        {{ "times.time // 86400" if layout.split else "first // " ~ rows_of_a_file }} AS part,
    {% if layout.split == "time" %}
        CASE WHEN times.time >= cutoffs.test THEN 2 WHEN times.time >= cutoffs.validation THEN 1
             ELSE 0 END::TINYINT AS split
        FROM owners JOIN times USING (request) LEFT JOIN cutoffs ON true)
    {% elif layout.split == "column" %}
        logged_split::TINYINT AS split FROM owners JOIN times USING (request))
    {% elif layout.split %}
        {% set key = "usr" if layout.split == "user" else "request" %}
        -- The share of the test comes first, so that it does not depend on that of the validation.
        CASE WHEN md5('{{ layout.seed }} ' || {{ key }}::VARCHAR) <
                 '{{ digest(layout.test_share) }}' THEN 2
             WHEN md5('{{ layout.seed }} ' || {{ key }}::VARCHAR) <
                 '{{ digest(layout.test_share + layout.validation_share) }}' THEN 1
             ELSE 0 END::TINYINT AS split FROM owners JOIN times USING (request))
    {% else %}
        2::TINYINT AS split FROM owners JOIN times USING (request))
    {% endif %},
    numbered AS (
{{ numbered("timed", "split, part", "split, part", "time, request") }})
    SELECT request, usr, users, split, time, first_time <> time OR last_time <> time AS moved,
        first // {{ rows_of_a_file }} AS file, first % {{ rows_of_a_file }} AS "row", (ordinal - 1)::INT AS number
        FROM numbered;

-- 4. Candidates: an item once per request, with all its positive labels, as far as any of its rows
-- came; at most {{ layout.retrieved }} per request, in the order of the funnel.
CREATE TABLE repeated AS
    -- Pairs that happen to share a hash do no harm: they are different groups below.
    WITH again AS (SELECT hash(request, item) AS pair FROM good GROUP BY pair HAVING count(*) > 1)
    SELECT file, "row", place,
        row_number() OVER (PARTITION BY number, item ORDER BY file, "row", place) AS turn,
    {% for column in merged %}
        max(good.{{ column }}) OVER (PARTITION BY number, item) AS {{ column }},
    {% endfor %}
        min(good.position) OVER (PARTITION BY number, item) AS position
    FROM (SELECT good.* FROM good SEMI JOIN again ON hash(request, item) = pair) AS good
    JOIN (SELECT request, usr AS owner, number FROM requests) AS owned USING (request) WHERE usr = owner;
CREATE TABLE candidates AS
    SELECT good.file, good."row", good.place, good.item, good.teacher_weight,
        coalesce(repeated.label_weight, good.label_weight) AS merged_weight,
    {% for column in merged if column != name("label_weight") %}
        coalesce(repeated.{{ column }}, good.{{ column }}) AS {{ column }},
    {% endfor %}
        coalesce(repeated.position, good.position) AS position,
    {% for task in layout.scored_tasks %}
        good."teacher:{{ task }}",
    {% endfor %}
    {% for feature in layout.of("candidate") %}
        good."feature:{{ feature.name }}",
    {% endfor %}
        owned.number, owned.split, owned.time AS request_time
    FROM good JOIN requests AS owned ON good.request = owned.request AND good.usr = owned.usr
    LEFT JOIN repeated ON good.file = repeated.file AND good."row" = repeated."row"
        AND good.place = repeated.place
    WHERE coalesce(repeated.turn, 1) = 1;
CREATE TABLE beyond AS
    WITH large AS (SELECT number FROM candidates GROUP BY number
        HAVING count(*) > {{ layout.retrieved }}),
    ranked AS (SELECT file, "row", place,
        row_number() OVER (PARTITION BY number ORDER BY {{ funnel_order }}) AS turn
        FROM (SELECT candidates.* FROM candidates SEMI JOIN large USING (number)) AS candidates)
    SELECT file, "row", place FROM ranked WHERE turn > {{ layout.retrieved }};
-- Only now do labels decide on weights: of two rows of an item each may have what the other lacks.
CREATE VIEW used AS SELECT candidates.*,
        CASE WHEN {% for task in layout.labels %}"label:{{ task }}" < 0 OR {% endfor %}false
             THEN 0 ELSE merged_weight END::FLOAT AS label_weight
    FROM candidates ANTI JOIN beyond USING (file, "row", place);
CREATE TABLE rejected AS
{% if layout.by_request %}
    SELECT file, "row", (-1)::BIGINT AS place, greatest(entries, 1) AS entries, why
        FROM listed WHERE why IS NOT NULL UNION ALL
{% endif %}
    SELECT file, "row", place, 1 AS entries, why FROM typed WHERE why IS NOT NULL UNION ALL
    SELECT file, "row", place, 1, 'several_hours'
        FROM typed SEMI JOIN too_long USING (request) WHERE why IS NULL UNION ALL
    SELECT good.file, good."row", place, 1, 'several_users' FROM good
        JOIN (SELECT request, usr AS owner FROM requests WHERE users > 1) AS owned USING (request)
        WHERE usr <> owner UNION ALL
    SELECT file, "row", place, 1, 'duplicate_item' FROM repeated WHERE turn > 1 UNION ALL
    SELECT file, "row", place, 1, 'beyond_retrieved' FROM beyond;
-- The rejected rows that go to a file.
CREATE TABLE reported AS
    SELECT file, "row", place, why FROM (SELECT *,
        row_number() OVER (PARTITION BY why ORDER BY file, "row", place) AS turn FROM rejected) AS counted
    WHERE turn <= {{ most_reported }};
-- One look at the log for the features of requests and for rejected rows: lists take long to read.
{% set of_requests = layout.of("user", "context", "event") %}
CREATE {{ "VIEW" if layout.by_request else "TABLE" }} request_columns AS
    SELECT file, "row"{{ and_names(of_requests | map(attribute="column") | unique) }} FROM log
    {% if not layout.by_request %}
    SEMI JOIN (SELECT file, "row" FROM requests UNION ALL SELECT file, "row" FROM reported) AS places
        USING (file, "row")
    {% endif %};
{% if layout.engine == "duckdb" %}
-- The largest table makes room for the sort.
DROP VIEW good;
DROP VIEW typed;
DROP TABLE staged;
{% endif %}

-- 5. Ids: the most frequent in training first, then what training lacks. Features are those of the
-- first row of a request, and of the last row of an item.
{% set counted %}
count(*) FILTER (WHERE split = 0) AS train, count(*) AS total,
        CASE WHEN count(*) FILTER (WHERE split = 0) > 0 THEN 0 ELSE count(*) END AS cold
{%- endset %}
{% macro with_ids(known, columns="value") %}
{% if known %}
    SELECT {{ columns }}, train, total, coalesce(known.id, {{ known_size[known] }} - 1
            + row_number() OVER (PARTITION BY known.id IS NULL ORDER BY train DESC, cold DESC, value)) AS id
        FROM counted LEFT JOIN {{ known }} AS known USING (value)
{%- else %}
    SELECT {{ columns }}, train, total, ordinal - 1 AS id FROM (
{{ numbered("counted", "train, cold", "train DESC, cold DESC", "value") }}) AS numbered
{%- endif %}
{% endmacro %}
CREATE TABLE users AS
    WITH counted AS (SELECT usr AS value, {{ counted }} FROM requests GROUP BY usr)
{{ with_ids("known_user" if known_size else "") }};
CREATE TABLE items AS
    WITH of_items AS (SELECT item, {{ counted }}, max(request_time) AS last_time FROM used GROUP BY item),
    counted AS (SELECT *{{ " FROM of_items JOIN names USING (item)" if has_names else ", item AS value FROM of_items" }}),
    -- Times first: the places of all rows would take much longer to compare.
    placed AS (SELECT item, max(file * {{ rows_of_a_file }} + "row") AS last,
        arg_max(place, file * {{ rows_of_a_file }} + "row") AS place
        FROM used JOIN of_items USING (item) WHERE request_time = last_time GROUP BY item),
    numbered AS (
{{ with_ids("known_item" if known_size else "", "value, item") }})
    SELECT value, item, train, total, id{{ raw_and_features(layout.of("item")) }}
        FROM numbered JOIN placed USING (item)
    {% if layout.of("item") %}
        JOIN unfolded AS log ON log.file = last // {{ rows_of_a_file }}
            AND log."row" = last % {{ rows_of_a_file }} AND log.place = placed.place
    {% endif %};
CREATE TABLE request_rows AS
    SELECT requests.*, users.id AS user_id{{ raw_and_features(of_requests) }}
        FROM requests JOIN users ON usr = value
        JOIN request_columns AS log ON log.file = requests.file AND log."row" = requests."row";
{% if not layout.by_request %}
CREATE TABLE reported_columns AS
    SELECT request_columns.* FROM request_columns SEMI JOIN reported USING (file, "row");
{% if layout.engine == "duckdb" %}
-- Histories may be long, and `request_rows` has those of requests.
DROP TABLE request_columns;
{% endif %}
{% endif %}
{% for feature in vocabularies %}
CREATE TABLE {{ vocabulary(feature) }} AS
    {% set value = '"feature:' ~ feature.name ~ '"' %}
    {% set known = "known_feature:" ~ feature.name %}
    WITH of_rows AS (SELECT {{ "unnest(" ~ value ~ ")" if feature.kind == "bag" else value }} AS value,
        {{ "train, total" if feature.of == "item" else "(split = 0)::BIGINT AS train, 1 AS total" }}
        FROM {{ {"item": "items", "candidate": "used"}.get(feature.of, "request_rows") }}),
    counted AS (SELECT value, sum(train)::BIGINT AS train, sum(total)::BIGINT AS total FROM of_rows
        {% if known in known_size %}ANTI JOIN {{ name(known) }} USING (value){% endif %}
        WHERE value IS NOT NULL GROUP BY value),
    ranked AS (
{{ numbered("counted", "train", "train DESC", "value") }})
    SELECT value, train, total,
        CASE WHEN ordinal <= {{ feature.size - known_size.get(known, 0) }} AND train > 0
             THEN ordinal END AS id FROM ranked;
{% endfor %}

-- 6. The fields to encode; `encode.write_ordered` sorts them, which takes longer by 64 bits.
CREATE VIEW item_fields AS SELECT value, id{{ and_features(layout.of("item")) }} FROM items;
CREATE VIEW request_fields AS SELECT request, file::INT AS file, number, split, time, user_id
    {{ and_features(of_requests) }} FROM request_rows;
CREATE VIEW candidate_fields AS SELECT number, split, stage, position, item, id::INT AS item_id,
    label_weight, teacher_weight
    {% for task in layout.tasks %}, "label:{{ task }}"{% endfor %}
    {% for task in layout.scored_tasks %}, "teacher:{{ task }}"{% endfor %}
    {% for fact in facts %}, {{ name(fact) }}{% endfor %}
    {{ and_features(layout.of("candidate")) }} FROM used JOIN items USING (item);
