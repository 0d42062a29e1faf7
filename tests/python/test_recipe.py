import json

import pytest
from phiquant.errors import PhiquantError
from phiquant.recipe import Recipe, as_recipe
from phiquant.spec import spec, target

NAMES = ["model.embed_tokens", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"]


def test_the_first_match_decides():
    recipe = Recipe({"*.0.mlp.*": "int8-channel-sym", "*.mlp.*": "gguf:Q4_0"}, default="float")
    assert recipe.spec_for(NAMES[1]) == spec("int8-channel-sym")
    assert recipe.spec_for(NAMES[2]) == target("gguf:Q4_0").spec


def test_head_and_embedding_stay_float_unless_named():
    assert Recipe(default="int4-g32-sym").resolve(NAMES) == {
        "model.embed_tokens": None,
        "model.layers.0.mlp.down_proj": spec("int4-g32-sym"),
        "model.layers.1.mlp.down_proj": spec("int4-g32-sym"),
        "lm_head": None,
    }
    assert Recipe({"lm_head": "int8-g32-sym"}).spec_for("lm_head") == spec("int8-g32-sym")


def test_patterns_match_whole_names():
    recipe = Recipe({"re:.*layers\\.[01]\\..*": "int4-g32-sym"})
    assert recipe.spec_for("model.layers.1.x") == spec("int4-g32-sym")
    assert recipe.spec_for("model.layers.2.x") is None
    assert Recipe({"mlp": "int4-g32-sym"}).spec_for("model.mlp") is None


def test_a_target_without_codes_means_float():
    assert as_recipe("gguf:F16").spec_for("model.layers.0.mlp.down_proj") is None


def test_json_keeps_order_and_meaning():
    recipe = Recipe({"b*": "gguf:Q4_0", "a*": "float", "re:c.": "uint4-g64-asym-f16"}, default="gguf:Q4_1")
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert list(json.loads(recipe.to_json())["rules"]) == ["b*", "a*", "re:c."]


def test_json_from_a_file(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text('{"rules": {"lm_head": "int8-g32-sym"}}')
    assert Recipe.from_json(path) == Recipe({"lm_head": "int8-g32-sym"})


def test_a_pattern_without_a_match_is_an_error():
    with pytest.raises(PhiquantError, match=r"'layers\.7\.\*' matches none of the 4 modules"):
        Recipe({"layers.7.*": "int4-g32-sym"}).resolve(NAMES)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        ('{"rule": {}}', "JSON object"),
        ('{"rules": []}', "maps patterns"),
        ('{"rules": {"a": 4}}', "not to a int"),
        ('{"rules": {"a": "int9-g32-sym"}}', "1 to 8 bits"),
        ('{"rules": {"re:(": "float"}}', "not a regular expression"),
        ('{"rules": {"": "float"}}', "non-empty"),
        ('{"default": "gguf:Q9"}', "unknown target"),
    ],
)
def test_bad_json_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        Recipe.from_json(text)
