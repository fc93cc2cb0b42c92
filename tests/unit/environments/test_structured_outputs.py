import json
import time

import pytest
from environment_runs import environment, score

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}},
    },
    "required": ["name"],
    "$defs": {"tag": {"type": "object", "properties": {"id": {"type": "string"}, "new": {"type": "boolean"}}}},
}


def row(schema=PERSON, **change):
    return {"prompt": "Who?", "schema_str": json.dumps(schema), "schema_type": "json", **change}


def verdicts(*pairs, **options):
    env = environment("structured_outputs", **options)
    assert [env.validate(row) for row, _ in pairs] == [None] * len(pairs)
    return [(reward.value, reward.reason) for reward in score(env, *pairs)]


def test_the_whole_text_must_be_json_that_the_strict_schema_allows():
    good = {"name": "Ann", "age": 7, "tags": [{"id": "x", "new": True}]}
    assert verdicts(
        (row(), json.dumps(good)),
        (row(), f"<think>Hm.</think>\n{json.dumps(good)} "),
        (row(schema_type=None), json.dumps(good)),
        (row(), json.dumps(good | {"age": "seven"})),
        (row(), json.dumps({"name": "Ann", "tags": []})),
        (row(), json.dumps(good | {"more": 1})),
        (row(), json.dumps(good | {"tags": [{"id": "x"}]})),
        (row(), f"```json\n{json.dumps(good)}\n```"),
        (row(), f"Here it is: {json.dumps(good)}"),
        (row(), " "),
        (row(), json.dumps(good)[:-1]),
    ) == [
        (1.0, "valid"),
        (1.0, "valid"),
        (1.0, "valid"),
        (0.0, "$.age: 'seven' is not of type 'integer'"),
        (0.0, "$: 'age' is a required property"),
        (0.0, "$: Additional properties are not allowed ('more' was unexpected)"),
        (0.0, "$.tags[0]: 'new' is a required property"),
        (0.0, "not json: Expecting value: line 1 column 1 (char 0)"),
        (0.0, "not json: Expecting value: line 1 column 1 (char 0)"),
        (0.0, "the final text is empty"),
        (0.0, "not json: Expecting ',' delimiter: line 1 column 61 (char 60)"),
    ]


def test_objects_are_strict_wherever_they_stand_but_parts_of_allof_are_not():
    inner = {"type": "object", "properties": {"a": {"type": "integer"}}}
    either = {"anyOf": [inner, {"type": "array", "prefixItems": [inner]}]}
    both = {"allOf": [inner, {"type": "object", "properties": {"b": {"type": "integer"}}}]}
    named = {"type": "object", "properties": {"properties": {"type": "string"}}}
    rewards = verdicts(
        (row(either), '{"a": 1}'),
        (row(either), "{}"),
        (row(either), '[{"a": 1, "b": 2}]'),
        (row(both), '{"a": 1, "b": 2}'),
        (row(named), '{"properties": "x"}'),
        (row(named), "{}"),
        (row({"type": "object"}), '{"any": 1}'),  # without properties it stays free
    )
    assert [value for value, _ in rewards] == [1, 0, 0, 1, 1, 0, 1]


FLAT = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
TABLE = {
    "type": "array",
    "items": {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": ["integer", "null"]}}},
}
DOCUMENT = {
    "type": "object",
    "properties": {
        "person": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "age": {"type": "integer"},
                "tags": {"type": "array", "items": {"type": "string"}},
                "alive": {"type": "boolean"},
                "note": {"type": "string"},
            },
        }
    },
}
XML = "<person><name>Ann</name><age>7</age><tags><tag>a</tag><tag>b</tag></tags><alive>true</alive><note/></person>"


@pytest.mark.parametrize(
    ("schema_type", "schema", "text", "value", "reason"),
    [
        ("yaml", FLAT, "name: Ann\nage: 7", 1, "valid"),
        ("yaml", FLAT, "name: Ann\nage: seven", 0, "$.age: 'seven' is not of type 'integer'"),
        ("yaml", FLAT, "name: [", 0, "not yaml: while parsing a flow"),
        ("yaml", FLAT, "1: x", 0, "not yaml: a key is not a string"),
        ("toml", FLAT, 'name = "Ann"\nage = 7', 1, "valid"),
        ("toml", FLAT, "name = Ann", 0, "not toml: Invalid value"),
        ("csv", TABLE, "name,age\nAnn,7\nBob,\n", 1, "valid"),
        ("csv", TABLE, "name,age\nAnn,seven\n", 0, "$[0].age: 'seven' is not of type 'integer', 'null'"),
        ("csv", TABLE, "name,age\nAnn,7,8\n", 0, "not csv: a row has more fields than the header"),
        ("xml", DOCUMENT, XML, 1, "valid"),
        ("xml", DOCUMENT, XML.replace("7", "seven"), 0, "$.person.age: 'seven' is not of type 'integer'"),
        ("xml", DOCUMENT, XML.replace("<tag>b</tag>", ""), 1, "valid"),  # one child is a list of one
        (
            "xml",
            DOCUMENT,
            XML.replace("<person>", '<person id="1">'),
            0,
            "$.person: Additional properties are not allowed",
        ),
        ("xml", DOCUMENT, XML[:-3], 0, "not xml: "),
        ("xml", DOCUMENT, '<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', 0, "not xml: it declares an entity"),
    ],
)
def test_other_formats_are_read_as_the_schemas_types(schema_type, schema, text, value, reason):
    [(got, said)] = verdicts((row(schema, schema_type=schema_type), text))
    assert got == value and said.startswith(reason)


def test_hostile_answers_get_a_reason_in_bounded_time():
    bomb = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
    backtracking = row({"type": "string", "pattern": "^(a+)+$"})
    recursive = row({"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}}]})
    start = time.monotonic()
    rewards = verdicts(
        (backtracking, json.dumps("a" * 5000 + "!")),
        (row(schema_type="yaml"), bomb),
        (recursive, "[" * 900 + "]" * 900),
        (row(), "[" * 100_000),
        (row(), "9" * 100_000),
        (row(), '{"name": "\ud800'),
        verify_timeout_s=1.0,
    )
    assert [value for value, _ in rewards] == [0.0] * 6
    assert [reason for _, reason in rewards[:2]] == ["timeout", "timeout"]
    assert rewards[2][1] == "$: it is nested too deeply" and rewards[3][1] == "not json: it is nested too deeply"
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("schema_str", "sentence"),
    [
        ({"type": "object"}, "schema_str must be the text of a JSON Schema, not a dict"),
        ("{", "schema_str is not valid JSON: Expecting property name"),
        ("[" * 100_000, "schema_str is not valid JSON"),
        ("[1]", "schema_str must be a JSON object, not [1]"),
        ('{"type": "text"}', "schema_str has type 'text' at #, which must be one of array, boolean"),
        ('{"type": []}', "has type [] at #"),
        ('{"properties": ["a"]}', "has properties ['a'] at #, which must be an object"),
        ('{"properties": {"a": 7}}', "has 7 at #/properties/a where a schema must be"),
        ('{"items": [{}]}', "has [{}] at #/items where a schema must be"),
        ('{"anyOf": []}', "has anyOf [] at #, which must be a non-empty list"),
        ('{"properties": {"a": {"pattern": "("}}}', "has at #/properties/a the pattern '(', which is not a regular"),
        ('{"minimum": "0"}', "has minimum '0' at #, which must be a number"),
        ('{"maxItems": 1.5}', "has maxItems 1.5 at #, which must be a whole number of at least 0"),
        ('{"required": "a"}', "has required 'a' at #, which must be a list of names"),
        ('{"items": {"$ref": "https://a.b/c.json"}}', "refers at #/items to 'https://a.b/c.json', outside of itself"),
        ('{"$ref": "#/$defs/a"}', "refers at # to '#/$defs/a', which is not in it"),
        ('{"$ref": "#a"}', "refers at # to '#a', which is not in it"),
        ('{"items": ' * 300 + "{}" + "}" * 300, "is nested more than 200 levels deep"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused(schema_str, sentence):
    assert sentence in environment("structured_outputs").validate(row(schema_str=schema_str))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"schema_type": "ini"}, "schema_type must be one of json, yaml, xml, toml, csv, not 'ini'"),
        ({"response_mode": "tool_call"}, "response_mode is 'tool_call', but only answers in text are checked"),
        ({"prompt": ""}, "prompt is empty"),
    ],
)
def test_structured_outputs_names_what_is_wrong_with_a_row(change, sentence):
    assert sentence in environment("structured_outputs").validate(row(**change))
